"""Choose for each head the kind of pairs that MInference or MMInference gives it (arXiv 2407.02490, algorithm 1).

    python -m baselines.search CHECKPOINT --video my.mp4 --question "What happens?" --share 0.2 --output heads.json

reads one prompt with dense attention. For each head, every candidate is cut down until it takes at most `--share` of
the dense pairs (the paper's budget, which its kernels measure in operations), and the one counts whose output differs
least from the dense one. The result is the option `heads` of the method `minference`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import padding_mask
from .executor import attend
from .method import build
from .minference import MInference, check_choice
from .mminference import MMInference
from .scores import accurate

_NAME = "minference_search"
_CLASSES = {method.name: method for method in (MInference, MMInference)}


class _Searcher:
    """An attention function that gives dense attention, and on the way finds out what each head can do without."""

    def __init__(self, candidates: Sequence[dict[str, Any]], share: float, method: MInference):
        self.candidates, self.share, self.method = candidates, share, method
        self.layers: list[list[dict[str, Any]]] = []
        self.errors: list[list[list[float]]] = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
        is_causal = module.is_causal if is_causal is None else is_causal
        options = {"scale": scaling, "is_causal": is_causal, "enable_gqa": query.shape[1] != key.shape[1]}
        output = nn.functional.scaled_dot_product_attention(query, key, value, **options)
        if is_causal:
            if len(query) != 1 or attention_mask is not None:
                raise ValueError("`inputs` must be one prompt without padding")
            heads = [
                self._search(query[0], key[0], value[0], output[0], scaling, head) for head in range(query.shape[1])
            ]
            self.layers.append([choice for choice, _ in heads])
            self.errors.append([errors for _, errors in heads])
        return output.transpose(1, 2).contiguous(), None

    def _search(self, query, key, value, dense, scale, head) -> tuple[dict[str, Any], list[float]]:
        """The best candidate that the budget leaves of this head's, and the error of each."""
        group_size = len(query) // len(key)
        own = query[head][None], key[head // group_size][None]
        fitted, errors = [], []
        for candidate in self.candidates:
            fitted.append(self._fit(candidate, *own, scale))
            pattern = self.method.pattern_of([fitted[-1]], *own, scale)
            output, _ = attend(*own, value[head // group_size][None], pattern, scale)
            truth = accurate(dense[head])
            errors.append(float((accurate(output[0]) - truth).norm() / truth.norm()))
        return fitted[min(range(len(errors)), key=errors.__getitem__)], errors

    def _fit(self, candidate: dict[str, Any], query: Tensor, key: Tensor, scale: float) -> dict[str, Any]:
        """The largest share of the candidate's sizes whose pairs the budget allows."""

        def cut(part: float) -> dict[str, Any]:
            return candidate | {name: int(candidate[name] * part) for name in self.method.sizes[candidate["kind"]]}

        def is_allowed(part: float) -> bool:
            pattern = self.method.pattern_of([cut(part)], query, key, scale)
            return pattern.count() <= self.share * pattern.dense_pairs

        if is_allowed(1.0):
            return dict(candidate)
        low, high = 0.0, 1.0
        while any(
            int(size * low) < int(size * high) for size in map(candidate.get, self.method.sizes[candidate["kind"]])
        ):
            middle = (low + high) / 2
            low, high = (middle, high) if is_allowed(middle) else (low, middle)
            if high - low < 1e-3:
                break
        return cut(low)


@torch.no_grad()
def search(
    model: nn.Module,
    inputs: dict[str, Any],
    *,
    share: float,
    method: str = "minference",
    candidates: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Choices for each layer and head.

    Args:
        model: of Qwen2.5-VL, or of VideoNSA with `nsa_mode="dense"`.
        inputs: of its `forward`, one prompt without padding.
        share: of the dense pairs, that a head may take. (Each block of queries takes its own block or keys whatever
            the share.)
        method: "minference" or "mminference".
        candidates: choices, with the sizes that they have at most; by default the method's.
        options: of the method, but for `heads`; those that it runs with.
    Returns:
        `layers`, which the method's `heads` takes; `method`, `share`, `tokens`, and `errors`, by layer, head and
        candidate: the norm of the difference to dense attention's output, over the norm of that.
    Raises:
        ValueError: a share that is none, a candidate that is none, or more than one prompt.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be over 0 and at most 1, got {share!r}")
    if method not in _CLASSES:
        raise ValueError(f"`method` must be one of {', '.join(_CLASSES)}, got {method!r}")
    built = build(_CLASSES[method], options)
    candidates = built.candidates if candidates is None else candidates
    if not candidates:
        raise ValueError(f"`candidates` must name one choice at least, got {candidates!r}")
    for number, candidate in enumerate(candidates):
        check_choice(candidate, built.sizes, f"`candidates`[{number}]")
    searcher = _Searcher(candidates, share, built)
    AttentionInterface.register(_NAME, searcher)
    AttentionMaskInterface.register(_NAME, padding_mask)
    before = model.config.get_text_config()._attn_implementation
    try:
        model.set_attn_implementation({"text_config": _NAME})
        model(**inputs, logits_to_keep=1)
    finally:
        model.set_attn_implementation({"text_config": before})
    return {
        "layers": searcher.layers,
        "method": method,
        "share": share,
        "tokens": inputs["input_ids"].shape[1],
        "candidates": list(map(dict, candidates)),
        "errors": searcher.errors,
    }


def main() -> None:
    from modeling_videonsa import VideoNSAForConditionalGeneration
    from processing_videonsa import VideoNSAProcessor

    parser = argparse.ArgumentParser(description="Choose MInference's kind of pairs for each head.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder or Hub id, of Qwen2.5-VL or VideoNSA")
    parser.add_argument("--video", required=True)
    parser.add_argument("--question", default="Describe the video.")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--method", default="minference", choices=_CLASSES)
    parser.add_argument("--share", type=float, default=0.2, help="of the dense pairs, that a head may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = VideoNSAForConditionalGeneration.from_pretrained(
        arguments.checkpoint, nsa_mode="dense", dtype="auto", device_map={"": arguments.device}
    ).eval()
    processor = VideoNSAProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=False)
    content = [{"type": "video", "video": arguments.video}, {"type": "text", "text": arguments.question}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options, fps=arguments.fps)
    try:
        found = search(model, inputs.to(model.device), share=arguments.share, method=arguments.method)
    except ValueError as error:
        parser.error(str(error))
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    kinds = [choice["kind"] for layer in found["layers"] for choice in layer]
    print(
        f"{found['tokens']:,} tokens:",
        ", ".join(f"{kinds.count(kind)} heads {kind}" for kind in _CLASSES[arguments.method].sizes),
    )


if __name__ == "__main__":
    main()
