"""How alike the heads of a layer set their gates (arXiv 2510.02295, figures of inter-head similarity).

    python -m analysis.head_similarity path/or/hub-id --questions folder --output heads.json --plot heads.png

For each layer and branch, a matrix of Pearson correlations over the vision tokens t of all prompts together:

    r[i, j] = sum_t (g[t, i] - m[i]) (g[t, j] - m[j]) / sqrt(sum_t (g[t, i] - m[i])^2 sum_t (g[t, j] - m[j])^2)

where g[t, i] is the gate of head i and m[i] its mean. The paper gives no formula; its matrices lie in [-1, 1]. A head
whose gate is the same everywhere has no correlation: null.

And a principal component analysis: a prompt is the vector of its mean gates of all layers, heads and branches, the
first two components are its place. Vision tokens come before the question, so prompts about one video fall together.
"""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from .figure import BRANCH_COLOURS, Setting, command, drawn
from .observe import BRANCHES, Layer, check_sparse, read_prompt
from .questions import prepare

# Tokens that are in float64 at once.
CHUNK = 1 << 13
# More would be too small to read.
MAX_SHOWN = 7


class Correlation:
    """Pearson correlations of heads, one matrix per branch, of tokens that come in parts.

    Means and centred products are joined part by part (Chan, Golub and LeVeque 1979): in float64, and no difference
    of large sums is taken. Memory does not grow with tokens.
    """

    def __init__(self, num_heads: int):
        self.count = 0
        self.mean = torch.zeros(len(BRANCHES), num_heads, dtype=torch.float64)
        self.products = torch.zeros(len(BRANCHES), num_heads, num_heads, dtype=torch.float64)

    def add(self, gates: Tensor) -> None:
        """(tokens, num_heads, branches)"""
        for part in gates.split(CHUNK):
            part = part.permute(2, 1, 0).cpu().double()  # [branches, num_heads, tokens]
            mean, new = part.mean(-1), part.shape[-1]
            centred, step, total = part - mean[..., None], mean - self.mean, self.count + new
            self.products += centred @ centred.mT + step[..., None] * step[:, None] * (self.count * new / total)
            self.mean += step * (new / total)
            self.count = total

    def matrices(self) -> Tensor:
        """(branches, num_heads, num_heads), float64, nan in the rows and columns of heads that do not vary.

        Such a head is known exactly: sums of a chunk of equal float32 numbers are exact in float64, so is their mean.
        """
        spread = self.products.diagonal(dim1=-2, dim2=-1).sqrt()
        matrices = self.products / (spread[..., None] * spread[:, None])
        return matrices.clamp_(-1, 1)


@dataclass(frozen=True)
class Components:
    """Principal components.

    Attributes:
        places: (points, 2), float64.
        explained: shares of the variance, (2,), float64; `None` where all points are one.
    """

    places: Tensor
    explained: Tensor | None


def principal_components(vectors: Tensor) -> Components:
    """The first two, of (points, dimensions); zeros where there are fewer. The largest loading of each is positive."""
    # Equal points become exact zeros by the first difference, which a mean might miss by a rounding error.
    centred = vectors.double() - vectors[0].double()
    centred = centred - centred.mean(0)
    left, sizes, loadings = torch.linalg.svd(centred, full_matrices=False)
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = torch.where(largest < 0, -1.0, 1.0).double()
    places, explained = torch.zeros(len(vectors), 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    kept = min(2, len(sizes))
    places[:, :kept] = (left * sizes * sign)[:, :kept]
    variance = sizes.square()
    explained[:kept] = variance[:kept] / variance.sum()
    return Components(places, explained if variance.sum() > 0 else None)


@torch.inference_mode()
def run(setting: Setting) -> dict:
    """Matrices by layer and branch, their means over pairs of different heads, and the places of prompts.

    Raises:
        ValueError: a model without gates, or in dense mode.
    """
    check_sparse(setting.model)
    text = setting.model.config.get_text_config()
    layers = [Correlation(text.num_attention_heads) for _ in range(text.num_hidden_layers)]
    vectors = []
    for question in tqdm(setting.questions, desc="Head similarity", disable=None):
        means = torch.empty(len(layers), text.num_attention_heads, len(BRANCHES), dtype=torch.float64)

        def look(layer: Layer, means=means):
            layers[layer.index].add(layer.gates)
            means[layer.index] = layer.gates.mean(0, dtype=torch.float64).cpu()

        read_prompt(setting.model, prepare(setting.processor, [question], **setting.video_options), look)
        vectors.append(means.flatten())
    components = principal_components(torch.stack(vectors))
    explained = components.explained
    return {
        "vision_tokens": layers[0].count,
        "layers": [_numbers(layer.matrices()) for layer in layers],
        "components": {
            "explained": None if explained is None else [round(share, 4) for share in explained.tolist()],
            "prompts": [
                {"kind": question.kind, "place": [round(number, 5) for number in place]}
                for question, place in zip(setting.questions, components.places.tolist(), strict=True)
            ],
        },
    }


def _numbers(matrices: Tensor) -> dict[str, dict]:
    others = ~torch.eye(matrices.shape[-1], dtype=torch.bool)
    return {
        branch: {
            "mean_of_pairs": _rounded(matrix[others].nanmean().item()),
            "correlation": [[_rounded(number) for number in row] for row in matrix.tolist()],
        }
        for branch, matrix in zip(BRANCHES, matrices, strict=True)
    }


def _rounded(number: float) -> float | None:
    return round(number, 4) if number == number else None


def _shown(count: int) -> list[int]:
    """At most `MAX_SHOWN` layers at even distances, the first and the last among them."""
    if count <= MAX_SHOWN:
        return list(range(count))
    return [round(place * (count - 1) / (MAX_SHOWN - 1)) for place in range(MAX_SHOWN)]


def plot(results: dict) -> Figure:
    """Above, matrices of some layers; below, their means over pairs, of all layers, and the prompts' places."""
    layers, components = results["layers"], results["components"]
    shown = _shown(len(layers))
    figure = Figure(figsize=(max(8.0, 1.5 * len(shown) + 1), 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    grid = above.subplots(len(BRANCHES), len(shown), squeeze=False)
    for row, branch in zip(grid, BRANCHES, strict=True):
        for axes, index in zip(row, shown, strict=True):
            matrix = [drawn(line) for line in layers[index][branch]["correlation"]]
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[], facecolor="lightgray")
        row[0].set_ylabel(branch)
    for axes, index in zip(grid[0], shown, strict=True):
        axes.set_title(f"layer {index}", fontsize=9)
    above.colorbar(image, ax=grid, label="correlation of heads", shrink=0.8)
    left, right = below.subplots(1, 2)
    for branch in BRANCHES:
        means = drawn(layer[branch]["mean_of_pairs"] for layer in layers)
        left.plot(range(len(layers)), means, color=BRANCH_COLOURS[branch], marker="o", markersize=3, label=branch)
    left.axhline(0, color="lightgray", linewidth=0.8, zorder=0)
    left.set(xlabel="layer", ylabel="mean of different heads", ylim=(-1, 1))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=8)
    for number, kind in enumerate(dict.fromkeys(prompt["kind"] for prompt in components["prompts"])):
        places = [prompt["place"] for prompt in components["prompts"] if prompt["kind"] == kind]
        x, y = zip(*places, strict=True)
        right.scatter(x, y, s=22, alpha=0.7, label=kind, color=f"C{number % 10}", marker="os^Dv"[number // 10 % 5])
    shares = components["explained"] or [0.0, 0.0]
    right.set(xlabel=f"first component ({shares[0]:.0%})", ylabel=f"second component ({shares[1]:.0%})")
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    command(run, plot, __doc__)
