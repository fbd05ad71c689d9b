"""What VideoNSA needs of an engine: set where it was left open, refused where it was asked for otherwise."""

from typing import Any

from .internals import CompilationConfig, CUDAGraphMode, VerifyAndUpdateConfig, check_versions
from .loader import NAME as LOADER

OPERATOR = "vllm::videonsa_attention"


class VideoNSASettings(VerifyAndUpdateConfig):
    """Called by vLLM when it starts a VideoNSA model, before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check and complete a `VllmConfig`.

        Raises:
            ValueError: versions that were not tested (`internals.py`), or a setting under which the model would give
                other answers, or was not seen to give the same.
        """
        check_versions()
        refuse(vllm_config)
        split_graphs(vllm_config.compilation_config)
        choose_loader(vllm_config.model_config.multimodal_config.media_io_kwargs)


def refuse(vllm_config: Any) -> None:
    """Raise a ValueError for the first setting that does not go with VideoNSA."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, compilation = vllm_config.cache_config, vllm_config.compilation_config
    media, text = model.multimodal_config, model.hf_config.text_config
    graphs = compilation.cudagraph_mode
    not_right = "it gives other answers here"
    not_tested = "it was not tested with sparse attention"
    for name, value, is_refused, reason in (
        ("nsa_variant", text.nsa_variant, text.nsa_variant == "released", "only the variant 'paper' is served so far"),
        ("runner", model.runner_type, model.runner_type != "generate", "the model generates"),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, parallel.pipeline_parallel_size > 1, not_right),
        *(
            (name, getattr(parallel, name), getattr(parallel, name) > 1, not_right)
            for name in ("decode_context_parallel_size", "prefill_context_parallel_size")
        ),
        ("enable_dbo", parallel.enable_dbo, parallel.enable_dbo, not_right),
        ("speculative_config", "...", vllm_config.speculative_config is not None, not_right),
        ("kv_transfer_config", "...", vllm_config.kv_transfer_config is not None, not_right),
        (
            "kv_cache_dtype",
            cache.cache_dtype,
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            "vision keys are read back from the cache as they were written",
        ),
        ("kv_sharing_fast_prefill", True, cache.kv_sharing_fast_prefill, not_right),
        ("enable_prompt_embeds", True, model.enable_prompt_embeds, not_right),
        ("enable_mm_embeds", True, media.enable_mm_embeds, not_tested),
        ("video_pruning_rate", media.video_pruning_rate, bool(media.video_pruning_rate), not_right),
        ("enable_lora", True, vllm_config.lora_config is not None, not_tested),
        ("quantization", model.quantization, model.quantization is not None, not_tested),
        ("cudagraph_mm_encoder", True, compilation.cudagraph_mm_encoder, not_tested),
        (
            "cudagraph_mode",
            graphs,
            graphs is not None and graphs.has_full_cudagraphs(),
            "a whole graph cannot hold sparse attention; use PIECEWISE or NONE",
        ),
    ):
        if is_refused:
            raise ValueError(f"VideoNSA cannot be served with `{name}`={value}: {reason}")
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "VideoNSA was not tested with vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )


def split_graphs(compilation: Any) -> None:
    """Have vLLM's compiler split graphs at our operator, as it does at its own attention.

    Inside a graph that is captured, it would run once, for the first prompt, and then no more.
    """
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)
    if compilation.splitting_ops and OPERATOR not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATOR)
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def choose_loader(media_io_kwargs: dict[str, dict[str, Any]]) -> None:
    """Read videos by our loader.

    Raises:
        ValueError: another one was asked for.
    """
    options = media_io_kwargs.setdefault("video", {})
    if options.setdefault("video_backend", LOADER) != LOADER:
        raise ValueError(
            f"`media_io_kwargs` has video_backend={options['video_backend']!r}: VideoNSA reads videos itself"
        )
