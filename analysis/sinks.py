"""Keys that take much attention and give little: attention sinks (arXiv 2510.02295, figures 7 to 9).

    python -m analysis.sinks path/or/hub-id --questions folder --output sinks.json --plot sinks.png
    python -m analysis.sinks path/or/hub-id --dense_checkpoint path/or/hub-id --questions folder ...

A key is a sink where

    alpha > 0.1  and  |v| < median(|v|) - 2 IQR(|v|)

with median and interquartile range over the keys of one prompt, layer and key/value head. alpha is the attention that
the key receives, a mean over the query heads of its group, in two normalisations, as the paper says "average" and its
axis reaches 6.9, which no average of probabilities can:

    mean: over the queries that could see the key: those from it on, in the window branch as far as the window reaches.
        For selection too, whether they choose its block or not.
    sum: over all queries, a column sum.

Branches are `compression`, whose keys are complete blocks with pooled values; `selection` and `window`, whose keys are
vision tokens; and `all`, vision tokens with the sum of the branches' probabilities weighted by gates, where a block's
is spread evenly over its tokens. All queries are vision tokens. In dense attention every token is a query, and keys
are vision tokens (`dense`) or all tokens (`dense_all_keys`).

In short prompts no value may be small enough for the second condition, so the shares of keys that satisfy each
condition alone are given too, and the largest alpha.
"""

import argparse
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from nsa_kernels import compression

from .figure import BRANCH_COLOURS, Setting, command, drawn, load_dense
from .observe import BRANCHES, Layer, read_prompt
from .questions import prepare

LEAST_ALPHA = 0.1
RANGES = 2.0
BINS = 20
NORMALISATIONS = ("mean", "sum")
COLOURS = BRANCH_COLOURS | {"all": "black", "dense_all_keys": BRANCH_COLOURS["dense"]}


@dataclass(frozen=True)
class Received:
    """What the keys of a branch receive, of one key/value head.

    Attributes:
        total: (keys,), float64, probabilities summed over queries, a mean over the group's query heads.
        queries: (keys,), how many could see the key.
        norms: (keys,), float32, of the values.
    """

    total: Tensor
    queries: Tensor
    norms: Tensor

    def alpha(self, normalisation: str) -> Tensor:
        """(keys,), by one of `NORMALISATIONS`."""
        return self.total if normalisation == "sum" else self.total / self.queries

    def where(self, is_kept: Tensor) -> "Received":
        return Received(self.total[is_kept], self.queries[is_kept], self.norms[is_kept])


def is_small(norms: Tensor) -> Tensor:
    """(keys,) -> (keys,), bool: norms under the median by more than two interquartile ranges."""
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=norms.device)
    first, median, third = norms.double().quantile(quarters)
    return norms.double() < median - RANGES * (third - first)


def received(layer: Layer, head: int) -> dict[str, Received]:
    """By branch; of dense layers `dense` and `dense_all_keys`.

    Args:
        head: key/value head.
    """
    return _received_densely(layer, head) if layer.gates is None else _received_sparsely(layer, head)


def _received_densely(layer: Layer, head: int) -> dict[str, Received]:
    value = layer.value[head].float()
    total = torch.zeros(len(value), dtype=torch.float64, device=value.device)
    for _, probabilities in layer.dense_probabilities(head):
        total += probabilities.sum((0, 1))
    queries = torch.arange(len(value), 0, -1, device=value.device)
    every = Received(total / layer.group_size, queries, value.norm(dim=-1))
    return {"dense": every.where(layer.is_vision), "dense_all_keys": every}


def _received_sparsely(layer: Layer, head: int) -> dict[str, Received]:
    config, value = layer.config, layer.vision(layer.value)[head].float()
    length, size, group = len(value), config.block_size, layer.group_size
    pooled = compression.pool_blocks(value, size)
    from_it_on = torch.arange(length, 0, -1, device=value.device)
    queries = {
        # A block is seen from its last token on.
        "compression": from_it_on[size - 1 :: size],
        "selection": from_it_on,
        "window": from_it_on.clamp_max(config.window_size),
    }
    gates = layer.gates[:, head * group : (head + 1) * group]  # [queries, group_size, branches]
    found, gated = {}, torch.zeros(length, dtype=torch.float64, device=value.device)
    for index, branch in enumerate(BRANCHES):
        values = pooled if branch == "compression" else value
        sums = torch.zeros(2, len(values), dtype=torch.float64, device=value.device)
        for rows, probabilities in layer.branch_probabilities(branch, head):
            gate = gates[rows, :, index].flatten()
            sums += torch.stack([torch.ones_like(gate), gate]) @ probabilities.flatten(0, 1)
        total, weighted = sums / group
        found[branch] = Received(total, queries[branch], values.norm(dim=-1))
        if branch == "compression":
            weighted = weighted.repeat_interleave(size) / size
        gated[: len(weighted)] += weighted
    return found | {"all": Received(gated, from_it_on, value.norm(dim=-1))}


class Tally:
    """Counts of one layer and branch, by key/value head and by bin of the relative position."""

    def __init__(self, num_heads: int):
        self.keys, self.small = torch.zeros(2, num_heads, dtype=torch.long)
        self.above, self.sinks = torch.zeros(2, len(NORMALISATIONS), num_heads, dtype=torch.long)
        self.largest = torch.zeros(len(NORMALISATIONS), num_heads, dtype=torch.float64)
        self.key_bins = torch.zeros(BINS, dtype=torch.long)
        self.sink_bins = torch.zeros(len(NORMALISATIONS), BINS, dtype=torch.long)

    def add(self, head: int, keys: Received) -> None:
        count = len(keys.total)
        if not count:  # the prompt is shorter than a block
            return
        bins = (torch.arange(count, device=keys.total.device) * BINS) // count
        small = is_small(keys.norms)
        self.keys[head] += count
        self.small[head] += int(small.sum())
        self.key_bins += bins.bincount(minlength=BINS).cpu()
        for index, name in enumerate(NORMALISATIONS):
            alpha = keys.alpha(name)
            above = alpha > LEAST_ALPHA
            self.above[index, head] += int(above.sum())
            self.sinks[index, head] += int((above & small).sum())
            self.sink_bins[index] += bins[above & small].bincount(minlength=BINS).cpu()
            self.largest[index, head] = max(float(self.largest[index, head]), float(alpha.max()))

    def merge(self, other: "Tally") -> None:
        for name in ("keys", "small", "above", "sinks", "key_bins", "sink_bins"):
            getattr(self, name).add_(getattr(other, name))
        self.largest = torch.maximum(self.largest, other.largest)

    def numbers(self) -> dict:
        """Shares of keys."""
        keys = int(self.keys.sum())
        numbers = {"keys": keys, "small_values": _share(self.small.sum(), keys)}
        for index, name in enumerate(NORMALISATIONS):
            by_head = zip(self.sinks[index].tolist(), self.keys.tolist(), strict=True)
            numbers[name] = {
                "sinks": _share(self.sinks[index].sum(), keys),
                "sinks_by_head": [_share(sinks, of) for sinks, of in by_head],
                "above": _share(self.above[index].sum(), keys),
                "largest": round(float(self.largest[index].max()), 5),
            }
        return numbers


def _share(part: int | Tensor, keys: int) -> float | None:
    return round(int(part) / keys, 6) if keys else None


def _joined(tallies: list[Tally]) -> Tally:
    """The layers' counts together."""
    total = Tally(len(tallies[0].keys))
    for tally in tallies:
        total.merge(tally)
    return total


@torch.inference_mode()
def run(setting: Setting, dense_checkpoint: str | None = None) -> dict:
    """By layer, of all layers together, and by relative position, each by branch; and of each prompt the share.

    Args:
        dense_checkpoint: a model to compare with, that reads the same prompts with dense attention; may be the same.
    """
    models = [setting.model]
    if dense_checkpoint is not None:
        models.append(load_dense(dense_checkpoint, setting.model))
    found: dict[str, list[Tally]] = {}
    of_prompt: dict[str, list[Tally]] = {}

    def look(layer: Layer) -> None:
        for head in range(len(layer.key)):
            for branch, keys in received(layer, head).items():
                layers = of_prompt.setdefault(branch, [])
                layers += [Tally(len(layer.key)) for _ in range(layer.index + 1 - len(layers))]
                layers[layer.index].add(head, keys)

    prompts: dict[str, dict[str, list]] = {}
    for question in tqdm(setting.questions, desc="Sinks", disable=None):
        inputs = prepare(setting.processor, [question], **setting.video_options)
        of_prompt.clear()
        for model in models:
            read_prompt(model, inputs, look)
        for branch, layers in of_prompt.items():
            totals = found.setdefault(branch, [Tally(len(tally.keys)) for tally in layers])
            for total, tally in zip(totals, layers, strict=True):
                total.merge(tally)
            numbers, lists = (
                _joined(layers).numbers(),
                prompts.setdefault(branch, {name: [] for name in NORMALISATIONS}),
            )
            for name in NORMALISATIONS:
                lists[name].append(numbers[name]["sinks"])
    totals = {branch: _joined(layers) for branch, layers in found.items()}
    return {
        "videos": [question.video for question in setting.questions],
        "prompts": prompts,
        "rule": {"alpha_above": LEAST_ALPHA, "ranges_below_median": RANGES},
        "total": {branch: tally.numbers() for branch, tally in totals.items()},
        "layers": {branch: [tally.numbers() for tally in layers] for branch, layers in found.items()},
        "density": {
            branch: {"keys": tally.key_bins.tolist()}
            | {f"sinks_{name}": tally.sink_bins[index].tolist() for index, name in enumerate(NORMALISATIONS)}
            for branch, tally in totals.items()
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dense_checkpoint", help="folder or Hub id, read with dense attention, to compare with")


def plot(results: dict) -> Figure:
    """A row for each normalisation: sinks by layer, what alpha alone would call sinks, and sinks by position."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.subplots(len(NORMALISATIONS), 3)
    for name, (by_layer, alone, by_place) in zip(NORMALISATIONS, grid, strict=True):
        for branch, layers in results["layers"].items():
            style = {"color": COLOURS[branch], "linestyle": "--" if branch == "dense_all_keys" else "-"}
            for axes, what in ((by_layer, "sinks"), (alone, "above")):
                shares = [100 * share for share in drawn(layer[name][what] for layer in layers)]
                axes.plot(range(len(layers)), shares, marker="o", markersize=3, label=branch.replace("_", " "), **style)
            density = results["density"][branch]
            counts = zip(density[f"sinks_{name}"], density["keys"], strict=True)
            points = [((place + 0.5) / BINS, 100 * sinks / keys) for place, (sinks, keys) in enumerate(counts) if keys]
            by_place.plot(*zip(*points, strict=True), marker=".", **style)
        by_layer.set(xlabel="layer", ylabel=f"sinks, % of keys (alpha: {name})")
        alone.set(xlabel="layer", ylabel=f"keys with alpha > {LEAST_ALPHA}, %")
        by_place.set(xlabel="relative position", ylabel="sinks, % of keys there", xlim=(0, 1))
        for axes in (by_layer, alone, by_place):
            axes.set_ylim(bottom=0)
        for axes in (by_layer, alone):
            axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    command(run, plot, __doc__, add_arguments)
