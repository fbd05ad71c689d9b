"""Does a checkpoint hold what was planned, and does it compute what its source computes?"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from positions_videonsa import mrope_position_ids

from .safetensors_io import PlannedTensor, StoredTensor, read_headers, some

# Video of the prompt: grid steps, height and width in patches; 96 video tokens.
GRID = (6, 8, 8)


def compare_headers(folder: Path, plan: list[PlannedTensor]) -> dict[str, StoredTensor]:
    """The tensors in `folder`, which must be, by their headers, exactly the planned ones.

    Raises:
        ValueError: they are not.
    """
    found = read_headers(folder)
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan}
    headers = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    if wrong := [name for name in {**expected, **headers} if expected.get(name) != headers.get(name)]:
        raise ValueError(f"{folder} does not hold the planned tensors; different are {some(wrong)}")
    return found


def compare_tensors(
    folder: Path,
    plan: list[PlannedTensor],
    to_chunks: Callable[[PlannedTensor], Iterator[bytes]],
    on_compared: Callable[[int], object],
) -> None:
    """Compare every tensor in `folder` with what the plan makes of its source, byte by byte.

    Raises:
        ValueError: one differs.
    """
    found = compare_headers(folder, plan)
    for tensor in plan:
        stored = found[tensor.name]
        with stored.file.open("rb") as stream:
            stream.seek(stored.start)
            for chunk in to_chunks(tensor):
                if stream.read(len(chunk)) != chunk:
                    raise ValueError(f"{stored.file}: {tensor.name!r} is not what the source makes it")
                on_compared(len(chunk))


def compare_logits(
    source: Callable[[], PreTrainedModel], result: Callable[[], PreTrainedModel], modes: tuple[str, ...]
) -> None:
    """Run both models on a small prompt with a video, at equal positions, one model in memory at a time.

    Args:
        source, result: load a model.
        modes: values of `nsa_mode` to try; models without one are dense.
    Raises:
        ValueError: the logits are not equal to the last bit.
    """
    expected, found = _logits(source(), modes), _logits(result(), modes)
    for mode in modes:
        if not torch.equal(expected[mode], found[mode]):
            difference = (expected[mode].double() - found[mode].double()).abs().max().item()
            raise ValueError(f"the logits of the result differ from the source's in {mode} mode, by up to {difference}")


@torch.no_grad()
def _logits(model: PreTrainedModel, modes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        # Out of the memory-mapped file, where tensors lie at odd addresses and the BLAS may round otherwise.
        parameter.data = parameter.data.clone()
    inputs = _prompt(model)
    logits = {}
    for mode in modes:
        if hasattr(model.config, "nsa_mode"):
            model.config.nsa_mode = mode
        logits[mode] = model.eval()(**inputs).logits
    return logits


def _prompt(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Text, a video of noise, text; the same for every model of one shape."""
    config, vision = model.config, model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    steps, height, width = GRID
    merge = vision.spatial_merge_size
    vocabulary = min(config.text_config.vocab_size, config.image_token_id, config.video_token_id)
    text = torch.randint(0, vocabulary, (8,), generator=generator)
    video = torch.full((steps * height * width // merge**2,), config.video_token_id)
    types = torch.cat([torch.zeros(4), torch.full(video.shape, 2), torch.zeros(4)]).long()[None]
    grid = torch.tensor([GRID])
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    positions, _ = mrope_position_ids(
        types,
        None,
        grid,
        torch.ones(1),
        None,
        spatial_merge_size=merge,
        tokens_per_second=vision.tokens_per_second,
    )
    return {
        "input_ids": torch.cat([text[:4], video, text[4:]])[None],
        "mm_token_type_ids": types,
        "pixel_values_videos": torch.randn(steps * height * width, values, generator=generator).to(model.dtype),
        "video_grid_thw": grid,
        "position_ids": positions,
    }
