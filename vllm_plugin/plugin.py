"""What vLLM finds under its entry point group `vllm.general_plugins`."""

import logging

ARCHITECTURE = "VideoNSAForConditionalGeneration"

logger = logging.getLogger(f"vllm.{__name__}")  # so that it is shown as vLLM's own messages are


def register() -> None:
    """Tell vLLM of VideoNSA; in every process, whatever model it serves, and as often as it likes.

    What is wrong with versions and settings is said when a VideoNSA model is started (`settings.py`). Where not even
    that can be registered, it is said here, and other models are served all the same.
    """
    try:
        from transformers import AutoConfig

        from .internals import MODELS_CONFIG_MAP, ModelRegistry
        from .loader import register_loader
        from .settings import VideoNSASettings
        from .videonsa import VideoNSAConfig
    except (AttributeError, ImportError) as error:
        logger.warning("VideoNSA cannot be served by this vLLM and transformers: %s", error)
        return
    AutoConfig.register("videonsa", VideoNSAConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = VideoNSASettings
    # By name: importing it here would start CUDA in processes that fork.
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    register_loader()
