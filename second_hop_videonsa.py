"""What stood behind a moment of a video: the blocks that NSA's selection branch chose for its tokens.

The queries of a video are not kept, so a moment is run through the decoder once more, over a view of the cache up to
it: its frames are decoded and encoded again, and the reading's keys, theirs among them, are read and never written. The
choice itself and its weights, which are probabilities, are those of `nsa_kernels/compression.py`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

try:
    from .cache_videonsa import PastLayer
    from .footage_videonsa import ReadVideo
    from .generation_videonsa import CACHE_NAME
    from .kernels_videonsa import kernel_module
    from .kv_budget_videonsa import observed_queries
    from .layer_videonsa import vision_inputs
    from .routing_videonsa import VisionRouting
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import PastLayer
    from footage_videonsa import ReadVideo
    from generation_videonsa import CACHE_NAME
    from kernels_videonsa import kernel_module
    from kv_budget_videonsa import observed_queries
    from layer_videonsa import vision_inputs
    from routing_videonsa import VisionRouting

if TYPE_CHECKING:
    from .reading_videonsa import Reading


@dataclass(frozen=True)
class Place:
    """The part of a block in one temporal step of a video.

    Attributes:
        video, step: numbers, from 0.
        start, end: seconds in the video.
        box: (left, top, right, bottom) of the block's tokens there, as fractions of the frame.
        tokens: how many of them.
    """

    video: int
    step: int
    start: float
    end: float
    box: tuple[float, float, float, float]
    tokens: int


@dataclass(frozen=True)
class Block:
    """A block of consecutive vision tokens that tokens of a moment selected.

    Attributes:
        index: of the block; it begins at vision token index * block_size of the reading.
        chosen: of all (token, key/value head, layer) of the moment, the share that selected it.
        weight: the mean over the same of how much it counted there: its probability in the compressed attention that
            selection goes by, summed over the query heads of the group, each times its gate of the selection branch,
            and 0 where it was not selected. Weights of all blocks of a moment, scaled to a sum of 1.
        places: where in the video it lies; none where its tokens are of images alone.
    """

    index: int
    chosen: float
    weight: float
    places: tuple[Place, ...]


def selected_blocks(reading: "Reading", number: int, steps: Sequence[int], video: Any = None) -> list[list[Block]]:
    """For some steps of a video, the earlier blocks that their tokens selected, the largest weight first.

    A token's own block, which it always selects, is not among them. There are none in dense mode. The caller holds the
    model's lock.

    Args:
        number: of the video; steps: in it, ascending.
        video: as in `ReadVideo.frames`.
    Raises:
        ValueError: the frames cannot be had, or not be prepared as they were.
    """
    config, read = reading.model.config, reading.videos[number]
    if config.nsa_mode == "dense":
        return [[] for _ in steps]
    if reading.preparation:
        raise ValueError(
            f"frames cannot be prepared as these were, with {', '.join(reading.preparation)}: there is no second hop"
        )
    tokens = read.shape.step_tokens(config.vision_config.spatial_merge_size)
    found = []
    for step, features in zip(steps, _features(reading, read, steps, video), strict=True):
        start = read.first_token + step * tokens
        types = reading.types[: start + tokens]
        queries, gates = _run_again(reading, features, read.shape.positions(reading.model, step, step + 1), types)
        chosen, weight = _choices(reading, queries, gates, types, start)
        total = float(weight.sum()) or 1.0
        blocks = [
            Block(index, float(chosen[index]), float(weight[index]) / total, _places(reading, index))
            for index in (chosen > 0).nonzero()[:, 0].tolist()
        ]
        found.append(sorted(blocks, key=lambda block: (-block.weight, block.index)))
    return found


def _features(reading: "Reading", read: ReadVideo, steps: Sequence[int], video: Any) -> Iterator[Tensor]:
    """Of each step, its frames decoded and encoded anew: (tokens, hidden_size)."""
    model, rows = reading.model, read.shape.size[0] * read.shape.size[1]
    per_step, last = model.config.vision_config.temporal_patch_size, len(read.times)
    numbers = [frame for step in steps for frame in range(per_step * step, min(per_step * (step + 1), last))]
    device = next(model.model.visual.parameters()).device
    grid = torch.tensor([[1, *read.shape.size]], device=device)
    for patches in read.patches(reading.processor, numbers, video).split(rows):
        yield torch.cat(list(model.model.get_video_features(patches.to(device), grid, return_dict=True).pooler_output))


def _run_again(
    reading: "Reading", features: Tensor, positions: Tensor, types: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer, queries (1, num_heads, tokens, head_dim) and gates (tokens, num_heads, 3) of a step's tokens.

    Args:
        features: (tokens, hidden_size); positions: (3, 1, tokens).
        types: of all tokens up to these.
    """
    model, embedding = reading.model, reading.model.get_input_embeddings().weight
    cache = Cache(layers=[PastLayer(layer, len(types) - len(features)) for layer in reading.cache.layers])
    cache.mrope_deltas = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
    queries: list[list[Tensor]] = []
    with observed_queries(model, queries.append), _observed_gates(model) as gates:
        model.model(
            inputs_embeds=features[None].to(embedding),
            position_ids=positions.to(embedding.device),
            mm_token_type_ids=types[None].to(embedding.device),
            use_cache=True,
            **{CACHE_NAME: cache},
        )
    return queries[0], gates


@contextmanager
def _observed_gates(model) -> Iterator[list[Tensor]]:
    """Inside, the gates of vision rows are collected, (rows, num_heads, 3) for each layer."""
    gates: list[Tensor] = []
    temperature = model.config.gate_temperature

    def collect(module: nn.Module, args: tuple, logits: Tensor) -> None:
        gates.append(torch.sigmoid(logits.detach().reshape(-1, logits.shape[-1] // 3, 3) / temperature))

    with ExitStack() as stack:
        for layer in model.model.language_model.layers:
            stack.callback(layer.self_attn.g_proj_2.register_forward_hook(collect).remove)
        yield gates


def _choices(
    reading: "Reading", queries: Sequence[Tensor], gates: Sequence[Tensor], types: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Of each block before that of the first token: how often it was chosen, and its mean weight (see `Block`)."""
    config = reading.model.config
    compression, utils = kernel_module("compression"), kernel_module("utils")
    before = int((types[:start] != 0).sum()) // config.block_size
    chosen, weight = torch.zeros(2, before, dtype=torch.float64)
    for layer, query, gate, own in zip(
        reading.model.model.language_model.layers, queries, gates, reading.cache.layers, strict=True
    ):
        where = VisionRouting.build(types[None].to(query.device), None, start)
        keys = own.keys[..., : len(types), :].to(query.dtype)
        q, k, *_, lengths = vision_inputs(query, keys, keys, gate, where)
        (span,) = lengths.spans()
        sizes = {"block_size": config.block_size, "softmax_scale": layer.self_attn.scaling}
        indices = compression.select_blocks(
            q, k, lengths, block_counts=config.block_counts, backend=config.nsa_backend, **sizes
        )
        for head in range(k.shape[1]):
            heads = utils.head_slice(head, q.shape[1] // k.shape[1])
            # One more column than there are blocks, for -1.
            picked = q.new_zeros(len(q), len(k) // config.block_size + 2, dtype=torch.float64)
            picked.scatter_(1, indices[:, head].long() % picked.shape[1], 1.0)
            picked = picked[:, :before]
            chosen += picked.sum(0).cpu()
            pooled = compression.pool_blocks(utils.kv_head(k, span, head), config.block_size)
            states = q[:, heads].to(utils.accumulate_dtype(q.dtype)), pooled, span.first
            for rows, probs, _ in compression.probability_tiles(*states, **sizes):
                gated = (probs * gate[rows, heads, 1, None].to(probs)).sum(1)[:, :before]
                weight += (gated * picked[rows]).sum(0).cpu()
    count = len(queries) * len(q) * k.shape[1]
    return chosen / count, weight / count


def _places(reading: "Reading", index: int) -> tuple[Place, ...]:
    """Where the tokens of a block are."""
    config = reading.model.config
    order = (reading.types != 0).nonzero()[:, 0]  # of all vision tokens, where they are in the prompt
    tokens = order[index * config.block_size : (index + 1) * config.block_size]
    places = []
    for number, read in enumerate(reading.videos):
        height, width = (side // config.vision_config.spatial_merge_size for side in read.shape.size)
        inside = tokens - read.first_token
        inside = inside[(inside >= 0) & (inside < read.shape.steps * height * width)]
        steps, spans = inside // (height * width), read.spans(config.vision_config.temporal_patch_size)
        for step in steps.unique().tolist():
            at = inside[steps == step] % (height * width)
            rows, columns = at // width, at % width
            low, high = (int(columns.min()), int(rows.min())), (int(columns.max()) + 1, int(rows.max()) + 1)
            box = low[0] / width, low[1] / height, high[0] / width, high[1] / height
            places.append(Place(number, step, *spans[step], box, len(at)))
    return tuple(places)
