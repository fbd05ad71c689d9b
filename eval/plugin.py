"""What lmms-eval finds under its entry point group `lmms_eval.models`: the model name `videonsa`."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The classes behind `--model videonsa`, and behind `--model videonsa --force_simple`."""
    return ModelManifest(
        model_id="videonsa",
        chat_class_path="videonsa_eval.lmms_videonsa.VideoNSA",
        simple_class_path="videonsa_eval.lmms_videonsa.VideoNSASimple",
    )
