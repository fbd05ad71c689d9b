"""What vLLM finds under its entry point group `vllm.general_plugins`."""

ARCHITECTURE = "VideoNSAForConditionalGeneration"


def register() -> None:
    """Tell vLLM of VideoNSA; in every process, whatever model it serves, and as often as it likes.

    What can be wrong with versions and settings is said when a VideoNSA model is started (`settings.py`).
    """
    from transformers import AutoConfig

    from .internals import MODELS_CONFIG_MAP, ModelRegistry
    from .loader import register_loader
    from .settings import VideoNSASettings
    from .videonsa import VideoNSAConfig

    AutoConfig.register("videonsa", VideoNSAConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = VideoNSASettings
    # By name: importing it here would start CUDA in processes that fork.
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    register_loader()
