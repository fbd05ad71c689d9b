"""The gates of each branch, layer by layer, and how they spread (arXiv 2510.02295, figures of gate distributions).

    python -m analysis.gates path/or/hub-id --questions folder --output gates.json --plot gates.png

For each kind of question, of all vision tokens, heads and prompts: mean, standard deviation and quantiles of a layer's
gates in [0, 1].
"""

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from .figure import BRANCH_COLOURS, Setting, command
from .observe import BRANCHES, Layer, check_sparse, read_prompt
from .questions import prepare

BINS = 100
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class _Layer:
    """Sums over prompts, and a histogram, whose quantiles are right to a hundredth."""

    def __init__(self):
        self.sums, self.squares = torch.zeros(2, 3, dtype=torch.float64)
        self.count, self.histogram = 0, torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, gates: torch.Tensor) -> None:
        """(vision tokens, num_heads, 3)"""
        gates = gates.flatten(0, 1).double().cpu()
        self.sums += gates.sum(0)
        self.squares += gates.square().sum(0)
        self.count += len(gates)
        for branch in range(3):
            self.histogram[branch] += torch.histc(gates[:, branch], BINS, 0, 1)

    def numbers(self) -> dict[str, dict]:
        mean = self.sums / self.count
        spread = (self.squares / self.count - mean**2).clamp_min(0).sqrt()
        below = self.histogram.cumsum(1) / self.histogram.sum(1, keepdim=True)
        edges = [[(int((row < q).sum()) + 0.5) / BINS for q in QUANTILES] for row in below]
        return {
            branch: {
                "mean": round(float(mean[index]), 4),
                "std": round(float(spread[index]), 4),
                "quantiles": dict(zip(map(str, QUANTILES), edges[index], strict=True)),
            }
            for index, branch in enumerate(BRANCHES)
        }


@torch.inference_mode()
def run(setting: Setting) -> dict:
    """By kind, and of all kinds together: a list of layers, each by branch.

    Raises:
        ValueError: a model without gates, or in dense mode.
    """
    check_sparse(setting.model)
    num_layers = setting.model.config.get_text_config().num_hidden_layers
    kinds: dict[str, list[_Layer]] = {"all": [_Layer() for _ in range(num_layers)]}
    for question in tqdm(setting.questions, desc="Gates", disable=None):
        layers = kinds.setdefault(question.kind, [_Layer() for _ in range(num_layers)])

        def look(layer: Layer, layers=layers):
            for of in {id(layers): layers, id(kinds["all"]): kinds["all"]}.values():
                of[layer.index].add(layer.gates)

        read_prompt(setting.model, prepare(setting.processor, [question], **setting.video_options), look)
    return {kind: [layer.numbers() for layer in layers] for kind, layers in kinds.items()}


def plot(results: dict) -> Figure:
    """Mean over the layers, with the middle half shaded; single kinds as thin lines."""
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    layers = range(len(results["all"]))
    for branch, colour in ((branch, BRANCH_COLOURS[branch]) for branch in BRANCHES):
        numbers = [layer[branch] for layer in results["all"]]
        axes.plot(layers, [number["mean"] for number in numbers], color=colour, label=branch, marker="o")
        low, high = ([number["quantiles"][q] for number in numbers] for q in ("0.25", "0.75"))
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        for kind, of_kind in results.items():
            if kind != "all":
                axes.plot(layers, [layer[branch]["mean"] for layer in of_kind], color=colour, linewidth=0.5, alpha=0.6)
    axes.set(xlabel="layer", ylabel="gate", ylim=(0, 1), xticks=list(layers))
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    command(run, plot, __doc__)
