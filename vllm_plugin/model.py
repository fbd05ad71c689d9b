"""VideoNSA in vLLM: vLLM's Qwen2.5-VL with the attention of `attention.py` and the positions of VideoNSA."""

from collections.abc import Iterable
from typing import Any

import torch

from .attention import STEP, Step, VideoNSAAttention
from .internals import (
    MULTIMODAL_REGISTRY,
    Qwen2_5_VLForConditionalGeneration,
    get_forward_context,
    is_forward_context_available,
)
from .processing import VideoNSADummyInputs, VideoNSAMultiModalProcessor, VideoNSAProcessingInfo
from .routing import Routing, VisionFlags
from .settings import OPERATOR
from .videonsa import mrope_position_ids

_KINDS = {"image": 1, "video": 2}


@MULTIMODAL_REGISTRY.register_processor(
    VideoNSAMultiModalProcessor, info=VideoNSAProcessingInfo, dummy_inputs=VideoNSADummyInputs
)
class VideoNSAForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """What vLLM runs. In the mode "dense" it is vLLM's Qwen2.5-VL at VideoNSA's positions.

    Which rows of a step are vision rows is what vLLM itself replaces by images and videos: a placeholder token that the
    model generated, or a user wrote, is text, as in transformers.
    """

    # The tokens come beside their embeddings: where nobody said which rows are vision rows, they are looked at.
    requires_raw_input_tokens = True
    # Pixels are normalised by the processor, as in transformers, not by the vision tower.
    supports_mm_device_do_normalize = False

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text = self.config.text_config
        self.sparse_layers: list[VideoNSAAttention] = []
        self.flags: VisionFlags | None = None
        # Of the step that was embedded and has not run yet, (rows,) on the host; `None`: there is none.
        self.embedded: torch.Tensor | None = None
        if text.nsa_mode == "sparse":
            for name, layer in self.language_model.model.layers.named_children():
                layer.self_attn = VideoNSAAttention(layer.self_attn, text, f"{prefix}.layers.{name}.self_attn")
                self.sparse_layers.append(layer.self_attn)
            check_graphs(vllm_config.compilation_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's; dense attention has no gates, whose weights a checkpoint has all the same."""
        if not self.sparse_layers:
            weights = ((name, weight) for name, weight in weights if ".self_attn.g_proj_" not in name)
        return super().load_weights(weights)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[torch.Tensor, int]:
        """Positions of a prompt (3, length), int64, and what is added to the number of tokens to give the next one.

        vLLM multiplies seconds in float64, and the code that trained Qwen2.5-VL in float32: at some rates a position
        differs by one.
        """
        types = torch.zeros(1, len(input_tokens), dtype=torch.long)
        grids, seconds = {"image": [], "video": []}, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            types[:, place.offset : place.offset + place.length] = _KINDS[feature.modality]
            grids[feature.modality].append(feature.data[f"{feature.modality}_grid_thw"].data.tolist())
            if feature.modality == "video":
                seconds.append(float(feature.data["second_per_grid_ts"].data))
        vision = self.config.vision_config
        positions, deltas = mrope_position_ids(
            types,
            *(torch.tensor(grid) if grid else None for grid in grids.values()),
            torch.tensor(seconds) if seconds else None,
            spatial_merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
        )
        return positions[:, 0], int(deltas)

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As vLLM's; which rows become images or videos is remembered for `forward`. (rows,) -> (rows, hidden_size)."""
        has_vision = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        if has_vision and is_multimodal is not None:
            self.embedded = is_multimodal.cpu()  # vLLM has it on the host
        else:
            self.embedded = torch.zeros(len(input_ids), dtype=torch.bool)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One step: (rows, hidden_size).

        Raises:
            RuntimeError: vision rows were not sent through sparse attention in every layer.
        """
        step = self.next_step(input_ids) if self.sparse_layers else None
        if step is not None:
            get_forward_context().additional_kwargs[STEP] = step
        ids = None if inputs_embeds is not None else input_ids
        output = super().forward(ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        num_layers = len(self.sparse_layers)
        if step is not None and step.num_layers != num_layers:
            raise RuntimeError(
                f"{step.num_layers} of {num_layers} layers ran sparse attention: a compiled or captured graph left the "
                "others out. Start vLLM with --enforce-eager, and report it"
            )
        return output

    def next_step(self, input_ids: torch.Tensor | None) -> Step | None:
        """What the layers need to know of the step that was embedded last; `None` where it has no new vision tokens.

        Raises:
            RuntimeError: it has some, and nobody said where.
        """
        is_vision, self.embedded = self.embedded, None
        metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
        if not metadata:  # vLLM measures memory
            return None
        if is_vision is None:  # a step of vLLM's own making, to warm something up
            self.check_text(input_ids)
            return None
        layer = self.sparse_layers[0].attn
        metadata = metadata[layer.layer_name]
        _, common = metadata.videonsa
        if self.flags is None:
            num_blocks, _, block_size, _ = layer.kv_cache.shape
            self.flags = VisionFlags(num_blocks * block_size, block_size, layer.kv_cache.device)
        has_vision = bool(is_vision.any())
        self.flags.write(common.slot_mapping[: len(is_vision)], is_vision if has_vision else None)
        if not has_vision:
            return None
        # On the host, and exact where nothing is speculated.
        num_keys = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        routing = Routing.build(
            is_vision, starts, num_keys[: common.num_reqs].tolist(), common.block_table_tensor, self.flags
        )
        return Step.build(routing, metadata)

    def check_text(self, input_ids: torch.Tensor | None) -> None:
        """Raise a RuntimeError if there are placeholders of images or videos, (rows,)."""
        placeholders = self.config.image_token_id, self.config.video_token_id
        if input_ids is None or any(bool((input_ids == token).any()) for token in placeholders):
            raise RuntimeError("a step came without saying which of its tokens are images and videos")


def check_graphs(compilation: Any) -> None:
    """Raise a RuntimeError where vLLM would capture the sparse attention into a graph, whatever `settings.py` asked."""
    graphs = compilation.cudagraph_mode
    if graphs is None or not (graphs.has_full_cudagraphs() or graphs.has_piecewise_cudagraphs()):
        return
    if graphs.has_full_cudagraphs() or OPERATOR not in (compilation.splitting_ops or ()):
        raise RuntimeError(
            f"vLLM has set cudagraph_mode={graphs} and splitting_ops={compilation.splitting_ops}, which would capture "
            f"{OPERATOR}. Start it with --enforce-eager, and report it"
        )
