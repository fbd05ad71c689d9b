"""M-RoPE positions as Qwen2.5-VL was trained with them, and whether images and videos come with what they need."""

from collections.abc import Mapping
from typing import Any

import torch

try:
    from .kernels_videonsa import kernel_module
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from kernels_videonsa import kernel_module

_GRID_NAMES = {1: "`image_grid_thw`", 2: "`video_grid_thw`"}


def check_media(inputs: Mapping[str, Any], placeholders: Mapping[str, int], tokens: torch.Tensor | None = None) -> None:
    """Check that pixels have their grid, and a grid its pixels.

    Args:
        inputs: keywords of a model's call; those of images and videos are looked at.
        placeholders: token ids by "image" and "video".
        tokens: (batch, length) new token ids; a grid without pixels is wrong only where they have placeholders, since
            decoding steps and chunks of a prompt come with the grids of all of it. None where that is not known.
    Raises:
        ValueError: one comes without the other, has another number of axes, or they differ in their patches.
    """
    encoded, is_traced = inputs.get("mm_encoder_outputs") or {}, torch.compiler.is_compiling()
    for kind, pixels_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid_name = f"{kind}_grid_thw"
        pixels, grid = inputs.get(pixels_name), inputs.get(grid_name)
        if grid is not None and (grid.ndim != 2 or grid.shape[1] != 3):
            raise ValueError(f"`{grid_name}` must have shape (num_{kind}s, 3), got {tuple(grid.shape)}")
        if pixels is not None and grid is None:
            raise ValueError(f"`{pixels_name}` of shape {tuple(pixels.shape)} came without `{grid_name}`")
        if pixels is not None:
            if pixels.ndim != 2:
                raise ValueError(f"`{pixels_name}` must have shape (patches, pixels), got {tuple(pixels.shape)}")
            if not is_traced and pixels.shape[0] != (patches := int(grid.prod(-1).sum())):
                raise ValueError(
                    f"`{pixels_name}` has {pixels.shape[0]} patches, and `{grid_name}` = {grid.tolist()} has {patches}"
                )
        elif grid is not None and tokens is not None and tokens.shape[1] > 1 and encoded.get(kind) is None:
            # Decoding steps, of one token, are not looked at: on a GPU they would wait for the answer.
            is_missing = not is_traced and bool((tokens == placeholders[kind]).any())
            if is_missing:
                raise ValueError(f"`{grid_name}` = {grid.tolist()} came without `{pixels_name}`")


def mrope_position_ids(
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | list[float] | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    spatial_merge_size: int,
    tokens_per_second: float,
    truncate_seconds: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Temporal, height and width position of every token.

    Text advances all three by one. The tokens of an image or a video lie on its grid, offset by the position that its
    first text successor would have had; temporal step k is at floor(k * second_per_grid_ts * tokens_per_second). Text
    after it starts at **the largest of its positions + 1**. (transformers 5 starts it at the offset plus the larger
    of height and width instead, which for a long video lies inside the video's own temporal range.)

    Args:
        mm_token_type_ids: (batch, seq_len); 0 text, 1 image, 2 video.
        image_grid_thw, video_grid_thw: (num_images, 3) and (num_videos, 3), in patches before merging, over the batch.
        second_per_grid_ts: (num_videos,), seconds between two temporal grid steps; 1 where missing.
        attention_mask: (batch, seq_len); padding, where it is 0, gets position 0 and is not counted.
        spatial_merge_size: patches along each side of a token.
        tokens_per_second: temporal positions per second.
        truncate_seconds: cut second_per_grid_ts to integers first, as transformers 4.51 to 4.53 did, with which the
            published VideoNSA weights were trained. Above two frames a second all steps of a video are then at one
            temporal position.
    Returns:
        position_ids: (3, batch, seq_len), int64.
        rope_deltas: (batch, 1), int64: the next position minus the number of tokens so far.
    Raises:
        ValueError: the grids describe fewer or more tokens than there are, or there is no time for each video.
    """
    device = mm_token_type_ids.device
    grids = {kind: _to_list(grid) for kind, grid in ((1, image_grid_thw), (2, video_grid_thw))}
    seconds = [1.0] * len(grids[2]) if second_per_grid_ts is None else _to_list(second_per_grid_ts)
    if not isinstance(seconds, list) or len(seconds) != len(grids[2]) or any(isinstance(one, list) for one in seconds):
        raise ValueError(f"`second_per_grid_ts` = {seconds} must have one entry for each of {len(grids[2])} videos")
    if truncate_seconds:
        seconds = [int(value) for value in seconds]
    num_used = {1: 0, 2: 0}
    types = mm_token_type_ids.cpu()
    is_valid = torch.ones_like(types, dtype=torch.bool) if attention_mask is None else attention_mask.bool().cpu()
    position_ids = torch.zeros(3, *types.shape, dtype=torch.long)
    rope_deltas = torch.zeros(types.shape[0], 1, dtype=torch.long)

    for sample in range(types.shape[0]):
        sample_types = types[sample, is_valid[sample]]
        parts, next_position = [torch.empty(3, 0, dtype=torch.long)], 0
        changes = (sample_types.diff() != 0).nonzero().squeeze(-1) + 1
        for run in torch.tensor_split(sample_types, changes) if len(sample_types) else ():
            kind, num_left = int(run[0]), len(run)
            if kind == 0:
                parts.append(torch.arange(num_left).expand(3, -1) + next_position)
                next_position += num_left
                continue
            while num_left > 0:  # images without text between them form one run
                if num_used[kind] == len(grids[kind]):
                    raise ValueError(f"{_GRID_NAMES[kind]} = {grids[kind]} describes fewer tokens than the prompt has")
                t, h, w = grids[kind][num_used[kind]]
                # Steps times seconds, then times the rate, in float32: so did the code that trained Qwen2.5-VL.
                steps = torch.arange(t, dtype=torch.float32)
                temporal = steps * seconds[num_used[kind]] * tokens_per_second if kind == 2 else steps
                num_used[kind] += 1
                axes = temporal.floor().long(), *(torch.arange(n // spatial_merge_size) for n in (h, w))
                grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + next_position
                parts.append(grid)
                next_position = int(grid.max()) + 1
                num_left -= grid.shape[1]
            if num_left < 0:
                raise ValueError(f"{_GRID_NAMES[kind]} = {grids[kind]} describes more tokens than the prompt has")
        position_ids[:, sample, is_valid[sample]] = torch.cat(parts, dim=1)
        rope_deltas[sample] = next_position - len(sample_types)
    for kind, grid in grids.items():
        if num_used[kind] < len(grid):
            raise ValueError(f"{_GRID_NAMES[kind]} = {grid} describes more tokens than the prompt has")
    return position_ids.to(device), rope_deltas.to(device)


def _to_list(values: torch.Tensor | list | None) -> list:
    return [] if values is None else torch.as_tensor(values).tolist()


# `mrope_position_ids` in compiled code.
mrope_position_ids_operator = kernel_module("operators").define(
    "mrope_position_ids",
    "(Tensor mm_token_type_ids, Tensor? image_grid_thw, Tensor? video_grid_thw, Tensor? second_per_grid_ts, "
    "Tensor? attention_mask, int spatial_merge_size, float tokens_per_second, bool truncate_seconds) "
    "-> (Tensor, Tensor)",
    lambda *args: mrope_position_ids(
        *args[:5], spatial_merge_size=args[5], tokens_per_second=args[6], truncate_seconds=args[7]
    ),
    lambda types, *_: (
        types.new_empty(3, *types.shape, dtype=torch.long),
        types.new_empty(len(types), 1, dtype=torch.long),
    ),
)
