"""Everything that the plug-in takes from vLLM, in one table, and the versions in which it was seen to work.

Much of it is no public interface. A name is imported when it is first asked for: `register` runs in every process of
every model that vLLM serves, and must cost nothing there.
"""

import importlib
import logging
import os
from typing import Any

logger = logging.getLogger(f"vllm.{__name__}")  # so that it is shown as vLLM's own messages are

# Versions with which the tests pass; and one that has no build for CPUs and was not run: it has every name below, and
# its files of Qwen2.5-VL are those of the version before.
TESTED_VERSIONS = ("0.32.0",)
COMPARED_VERSIONS = ("0.33.0",)
ANY_VERSION = "VIDEONSA_VLLM_ANY_VERSION"

# transformers' oldest version that has all that our own code needs; vLLM 0.32 and 0.33 want less than 5.21.
OLDEST_TRANSFORMERS = (5, 20)

_QWEN = "vllm.model_executor.models.qwen2_5_vl"
_PLACES = {
    # registration
    "MODELS_CONFIG_MAP": "vllm.model_executor.models.config",
    "ModelRegistry": "vllm",
    "VerifyAndUpdateConfig": "vllm.model_executor.models.config",
    "CompilationConfig": "vllm.config",  # its `_attention_ops`: where graphs are split
    "CUDAGraphMode": "vllm.config",
    "VIDEO_LOADER_REGISTRY": "vllm.multimodal.video",
    "VideoLoader": "vllm.multimodal.video",
    # what becomes of images and videos
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "Qwen2_5_VLDummyInputsBuilder": _QWEN,
    "Qwen2_5_VLMultiModalProcessor": _QWEN,
    "Qwen2_5_VLProcessingInfo": _QWEN,
    # the model
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "ColumnParallelLinear": "vllm.model_executor.layers.linear",
    "ReplicatedLinear": "vllm.model_executor.layers.linear",
    "direct_register_custom_op": "vllm.utils.torch_utils",
    "get_forward_context": "vllm.forward_context",
    "is_forward_context_available": "vllm.forward_context",
    "get_attention_context": "vllm.model_executor.layers.attention.attention",
    "unified_attention_with_output": "vllm.model_executor.layers.attention.attention",
    "unified_kv_cache_update": "vllm.model_executor.layers.attention.attention",
    "subclass_attention_backend": "vllm.v1.attention.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def check_versions() -> None:
    """Raise where the plug-in was not seen to work.

    Raises:
        ValueError: transformers is too old; or vLLM is of another version and the environment does not allow any; or it
            lacks a name of the table.
    """
    import transformers
    import vllm

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST_TRANSFORMERS:
        wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ValueError(f"VideoNSA needs transformers {wanted} or later beside vLLM, got {transformers.__version__}")
    version = vllm.__version__.split("+")[0]
    if version in COMPARED_VERSIONS:
        logger.warning("VideoNSA was tested with vLLM %s, not yet with %s", ", ".join(TESTED_VERSIONS), version)
    elif version not in TESTED_VERSIONS and os.environ.get(ANY_VERSION) != "1":
        raise ValueError(
            f"VideoNSA's plug-in was tested with vLLM {', '.join(TESTED_VERSIONS)}, got {vllm.__version__}. It uses "
            f"internals of vLLM (vllm_plugin/internals.py); {ANY_VERSION}=1 tries all the same"
        )
    for name in _PLACES:
        try:
            __getattr__(name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"vLLM {vllm.__version__} has no {_PLACES[name]}.{name}, which VideoNSA needs") from error
    if not isinstance(getattr(__getattr__("CompilationConfig"), "_attention_ops", None), list):
        raise ValueError(f"vLLM {vllm.__version__} has no list CompilationConfig._attention_ops, which VideoNSA needs")
