"""Which blocks the selection branch chooses: how far back, in which frames, and whether neighbours agree.

    python -m analysis.selected_blocks path/or/hub-id --questions folder --output blocks.json --plot blocks.png

A vision token attends to its own block and to those that it finds most important among the ones before. By kind of
question and layer, over vision tokens, key/value heads and prompts, a token's own block left out everywhere but in
`union`:

    distance: in blocks, between the token's block and those it chooses; shares of all choices in bins 1, 2-3, 4-7, ..
    frames: shares of choices from the token's frame, from the one before, and from earlier ones. A frame is a temporal
        step of the video's grid (two pictures) or an image; a block belongs to the frame of its first token.
    uniform_distance, uniform_frames: what these would be if each token chose as many blocks, but by chance.
    union: how many distinct blocks a tile of neighbouring tokens chooses over the blocks of one token, between 1 and
        the tokens of a tile: the r of docs/kernel_model.md.
    kept: the share of a token's choices that the next token makes too.
"""

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.unions import union_statistics

from .figure import Setting, command, drawn
from .observe import Layer, check_sparse, read_prompt
from .questions import prepare

# What the selection kernel walks together: rows of a tile, which are tokens times the heads of a group.
TILE_ROWS, MAX_TILE_TOKENS = 128, 32
FRAMES = ("same", "previous", "earlier")
# Tokens whose choices are looked at together.
CHUNK = 1 << 14


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile of the selection kernel."""
    return max(1, min(MAX_TILE_TOKENS, TILE_ROWS // group_size))


def frames_of(types: Tensor, image_grids: Sequence, video_grids: Sequence, merge_size: int) -> Tensor:
    """The frame of every vision token, numbered through the prompt.

    Args:
        types: (vision tokens,), 1 for image, 2 for video tokens.
        image_grids, video_grids: (t, h, w) in patches, in the order of the prompt.
        merge_size: patches of a token along h and w.
    Returns:
        (vision tokens,), int64, ascending.
    Raises:
        ValueError: the grids make another number of tokens.
    """
    grids = {1: [list(map(int, grid)) for grid in image_grids], 2: [list(map(int, grid)) for grid in video_grids]}
    if sum(t * h * w // merge_size**2 for of in grids.values() for t, h, w in of) != len(types):
        raise ValueError(f"`image_grids` and `video_grids` = {grids} do not make the {len(types)} vision tokens")
    sizes: list[int] = []
    while (start := sum(sizes)) < len(types):
        t, h, w = grids[int(types[start])].pop(0)
        sizes += [h * w // merge_size**2] * t
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))


class Choices:
    """Sums over tokens, key/value heads and prompts of one layer and kind."""

    def __init__(self):
        self.distances, self.uniform_distances = torch.zeros(2, 0, dtype=torch.float64)
        self.frames, self.uniform_frames = torch.zeros(2, len(FRAMES), dtype=torch.float64)
        self.union, self.alone, self.kept, self.keepable = 0.0, 0.0, 0, 0

    def add(self, indices: Tensor, frames: Tensor, block_size: int, tile: int) -> None:
        """One prompt's.

        Args:
            indices: (vision tokens, num_kv_heads, block_counts), ascending, -1 at the end, the own block included.
            frames: (vision tokens,), ascending.
            block_size: tokens of a block.
            tile: tokens that the union is of.
        """
        longest = (len(indices) - 1) // block_size
        self.distances, self.uniform_distances = (
            torch.nn.functional.pad(counts, (0, max(0, longest + 1 - len(counts))))
            for counts in (self.distances, self.uniform_distances)
        )
        frames = frames.to(indices.device)
        for start in range(0, len(indices), CHUNK):
            self._add_tokens(indices[start : start + CHUNK + 1], start, frames, block_size)
        found = union_statistics(indices, tile)
        if found:
            distinct = found["blocks_per_tile"] * (len(indices) // tile) * indices.shape[1]
            self.union += distinct
            self.alone += distinct / found["r"]

    def _add_tokens(self, indices: Tensor, start: int, frames: Tensor, block_size: int) -> None:
        """Of `CHUNK` tokens from start on; indices have the next token too, where there is one."""
        tokens, following = indices[:CHUNK].long(), indices[1:].long()
        own = torch.arange(start, start + len(tokens), device=indices.device) // block_size
        is_choice = (tokens >= 0) & (tokens != own[:, None, None])
        of_block, of_token = frames[::block_size].contiguous(), frames[start : start + len(tokens)]

        distance = (own[:, None, None] - tokens)[is_choice]
        counted = distance.bincount(minlength=len(self.distances)).cpu()
        self.distances += counted
        back = (of_token[:, None, None] - of_block[tokens.clamp_min(0)])[is_choice]
        self.frames += back.clamp_max(len(FRAMES) - 1).bincount(minlength=len(FRAMES)).cpu()

        # By chance, each of the `own` blocks before would be among the choices with probability choices / own.
        chance = is_choice.sum((1, 2)).double() / own.clamp_min(1)
        of_own = torch.zeros(len(self.distances), dtype=torch.float64)
        of_own.index_add_(0, own.cpu(), chance.cpu())
        reached = of_own.flip(0).cumsum(0).flip(0)
        self.uniform_distances[1:] += reached[1:]
        since_same, since_previous = (torch.searchsorted(of_block, of_token - step) for step in (0, 1))
        same, previous = (own - since_same).clamp_min(0), (since_same.minimum(own) - since_previous).clamp_min(0)
        by_frame = torch.stack([same, previous, own - same - previous]).double()
        self.uniform_frames += (by_frame * chance).sum(1).cpu()

        # -1 at the end would break the order that the search needs.
        following = following.masked_fill(following < 0, torch.iinfo(torch.long).max)
        choices, is_choice = tokens[: len(following)], is_choice[: len(following)]
        place = torch.searchsorted(following.contiguous(), choices.contiguous()).clamp_max(following.shape[-1] - 1)
        self.kept += int(((following.gather(-1, place) == choices) & is_choice).sum())
        self.keepable += int(is_choice.sum())

    def numbers(self) -> dict:
        """Shares; `None` where there was nothing to choose."""
        return {
            "distance": _in_bins(self.distances),
            "uniform_distance": _in_bins(self.uniform_distances),
            "frames": dict(zip(FRAMES, _shares(self.frames), strict=True)),
            "uniform_frames": dict(zip(FRAMES, _shares(self.uniform_frames), strict=True)),
            "union": round(self.union / self.alone, 4) if self.alone else None,
            "kept": round(self.kept / self.keepable, 4) if self.keepable else None,
        }


def _shares(counts: Tensor) -> list[float | None]:
    total = float(counts.sum())
    return [round(count / total, 4) if total else None for count in counts.tolist()]


def _in_bins(counts: Tensor) -> dict[str, float | None]:
    """Counts of distances 0, 1, .. as shares of the bins 1, 2-3, 4-7, .., each twice as wide as the one before."""
    sums, first = {}, 1
    while first < len(counts):
        last = 2 * first - 1
        sums[str(first) if first == last else f"{first}-{last}"] = counts[first : last + 1].sum()
        first = last + 1
    return dict(zip(sums, _shares(torch.tensor(list(sums.values()), dtype=torch.float64)), strict=True))


@torch.inference_mode()
def run(setting: Setting) -> dict:
    """By kind, and of all kinds together: a list of layers.

    Raises:
        ValueError: a model without selection, or in dense mode.
    """
    check_sparse(setting.model)
    config = setting.model.config
    text = config.get_text_config()
    tile = tile_tokens(text.num_attention_heads // text.num_key_value_heads)
    kinds = {"all": [Choices() for _ in range(text.num_hidden_layers)]}
    for question in tqdm(setting.questions, desc="Selected blocks", disable=None):
        layers = kinds.setdefault(question.kind, [Choices() for _ in range(text.num_hidden_layers)])
        inputs = prepare(setting.processor, [question], **setting.video_options)
        ids = inputs["input_ids"][0]
        types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
        grids = (inputs.get(f"{what}_grid_thw", ()) for what in ("image", "video"))
        frames = frames_of(types[types > 0], *grids, config.vision_config.spatial_merge_size)

        def look(layer: Layer, layers=layers, frames=frames):
            heads = range(len(layer.key))
            indices = [torch.cat([chosen for _, chosen in layer.selected_blocks(head)]) for head in heads]
            indices = torch.stack(indices, dim=1)
            for of in {id(layers): layers, id(kinds["all"]): kinds["all"]}.values():
                of[layer.index].add(indices, frames, text.block_size, tile)

        read_prompt(setting.model, inputs, look)
    return {
        "tile": tile,
        "block_size": text.block_size,
        "block_counts": text.block_counts,
        "kinds": {kind: [layer.numbers() for layer in layers] for kind, layers in kinds.items()},
    }


def plot(results: dict) -> Figure:
    """Distances, frames, unions and agreement of neighbours; layers by colour or from left to right."""
    layers = results["kinds"]["all"]
    numbers = range(len(layers))
    figure = Figure(figsize=(10.5, 7), layout="constrained")
    (far, frames), (union, kept) = figure.subplots(2, 2)
    bins = list(layers[0]["distance"])
    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(layers)).tolist())
    for index, layer in enumerate(layers):
        shown = index in (0, len(layers) // 2, len(layers) - 1)
        label = f"layer {index}" if shown else None
        far.plot(range(len(bins)), drawn(layer["distance"].values()), color=colours[index], marker=".", label=label)
    chance = drawn(layers[0]["uniform_distance"].values())
    far.plot(range(len(bins)), chance, color="black", linestyle="--", label="by chance")
    far.set(xlabel="distance in blocks", ylabel="share of choices", ylim=(0, None))
    far.set_xticks(range(len(bins)), bins, rotation=30 if len(bins) > 6 else 0)
    for place, (frame, name) in enumerate(zip(FRAMES, ("own frame", "the one before", "earlier"), strict=True)):
        colour = f"C{place}"
        frames.plot(numbers, drawn(layer["frames"][frame] for layer in layers), color=colour, marker="o", label=name)
        by_chance = drawn(layer["uniform_frames"][frame] for layer in layers)
        frames.plot(numbers, by_chance, color=colour, linestyle="--", linewidth=1)
    frames.plot([], [], color="gray", linestyle="--", linewidth=1, label="by chance")
    frames.set(xlabel="layer", ylabel="share of choices", ylim=(-0.03, 1.03))
    for axes, what in ((union, "union"), (kept, "kept")):
        for kind, of_kind in results["kinds"].items():
            style = {"marker": "o"} if kind == "all" else {"linewidth": 0.6, "alpha": 0.6}
            axes.plot(numbers, drawn(layer[what] for layer in of_kind), color="tab:orange", **style)
    union.set(xlabel="layer", ylabel=f"distinct blocks of {results['tile']} tokens / of one", ylim=(1, None))
    kept.set(xlabel="layer", ylabel="choices that the next token makes too", ylim=(-0.03, 1.03))
    for axes in (frames, union, kept):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (far, frames):
        axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    command(run, plot, __doc__)
