"""How many questions a model answers rightly, as it is and changed: what the figures of accuracy have in common.

    rows = {"as trained": nullcontext, "dense": densely}
    scored = score(setting, rows)
    scored["rows"]["dense"]["mean"]["share"]
    difference(scored, "as trained", "dense")

A row is a `Change`: a function of the model that returns a context manager (see `changes.py`). An answer is generated
greedily, and `Question.score` decides. What `score` returns is of what JSON has:

    questions: kinds, videos and seconds, lists in the order of the questions (seconds of a video: None if not known).
    tokens: means over prompts: `prompt`, without padding, and `vision`, the image and video tokens among them.
    rows: by name:
        kinds: by kind, and mean: of all of them: right, total, share, low and high, Wilson's interval of 95 %.
        scores: 1 or 0 for each question, or between where the task says so.
        attention: shares of dense attention's pairs of query and key, each a mean over prompts. In sparse mode
            `exact` (all branches, counted), `without_compression` (the same without compressed blocks) and `formula`
            (the paper's, `paper_fraction` of the prompt's length); with a method of `baselines`, `exact` alone; dense,
            `exact` is 1. Of the variant "released", whose pairs are not counted, nothing.
        seconds, cpu_seconds: of `generate`, without preparing, over all questions.

Every kind weighs the same in a mean. Its interval is Wilson's for as many questions as would give a share of equal
variance: all of them where kinds have equally many. Wilson's intervals take questions for independent; several about
one video may not be, which `difference` allows for.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

import baselines
from attention_budget_videonsa import attention_budget, paper_fraction
from benchmarks.timing import synchronize

from .changes import Change, runs_method
from .figure import Setting, paired_difference, wilson
from .observe import is_sparse
from .questions import Question, batches, prepare

AS_TRAINED = "as trained"
ROWS: dict[str, Change] = {AS_TRAINED: nullcontext}
MAX_NEW_TOKENS = 16


@torch.inference_mode()
def score(setting: Setting, rows: Mapping[str, Change] = ROWS, max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
    """Ask every question once for each row; a batch of prompts is prepared once for all rows.

    Args:
        rows: by name, at least one.
        max_new_tokens: of an answer; a few are enough where it is a word.
    Returns:
        see the module.
    Raises:
        ValueError: before any video is read: no rows, a question without an answer, or max_new_tokens under 1.
    """
    if not rows:
        raise ValueError("`rows` must name at least one change")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be positive, got {max_new_tokens!r}")
    for question in setting.questions:
        question.check()
    model, device = setting.model, setting.model.device
    scored = {name: _Row() for name in rows}
    prompts: list[tuple[int, int]] = []
    done = tqdm(total=len(setting.questions) * len(rows), desc="Questions", disable=None)
    for batch in batches(setting.questions, setting.batch_size):
        inputs = prepare(setting.processor, batch, **setting.video_options)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        types = token_types(model, inputs)
        prompts += [(len(row), int(row.sum())) for row in types]
        for name, change in rows.items():
            with change(model):
                scored[name].add(model, setting.processor, inputs, batch, types, max_new_tokens)
            done.update(len(batch))
    done.close()
    lengths, vision = (sum(counts) / len(prompts) for counts in zip(*prompts, strict=True))
    return {
        "questions": {
            "kinds": [question.kind for question in setting.questions],
            "videos": [question.video for question in setting.questions],
            "seconds": [question.seconds for question in setting.questions],
        },
        "tokens": {"prompt": round(lengths, 1), "vision": round(vision, 1)},
        "rows": {name: row.numbers(setting.questions) for name, row in scored.items()},
    }


def difference(scored: Mapping[str, Any], first: str, second: str) -> dict[str, float]:
    """`paired_difference` of two rows of what `score` returns, by video; questions weigh the same, not kinds."""
    scores = (scored["rows"][name]["scores"] for name in (first, second))
    return paired_difference(*scores, scored["questions"]["videos"])


def shares(questions: Sequence[Question], scores: Sequence[int]) -> dict[str, dict]:
    """`kinds` and `mean` of a row; see the module. scores: for each question, from 0 to 1."""
    of_kinds: dict[str, list[int]] = {}
    for question, score in zip(questions, scores, strict=True):
        of_kinds.setdefault(question.kind, []).append(score)
    mean = sum(sum(kind) / len(kind) for kind in of_kinds.values()) / len(of_kinds)
    # Questions of one kind alone would give a share of variance p (1 - p) / equivalent.
    equivalent = len(of_kinds) ** 2 / sum(1 / len(kind) for kind in of_kinds.values())
    numbers = {kind: _numbers(sum(of_kind), len(of_kind)) for kind, of_kind in of_kinds.items()}
    return {"kinds": numbers, "mean": _numbers(mean * equivalent, equivalent) | _counts(scores)}


def token_types(model, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """For each prompt (length,), bool, without padding: true for image and video tokens."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    is_vision = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    return [row[valid] for row, valid in zip(is_vision, mask, strict=True)]


def attention_shares(model, types: torch.Tensor) -> dict[str, float]:
    """What a prompt costs of dense attention's pairs, as the model is set now; see the module. types: (length,)."""
    text = model.config.get_text_config()
    if not is_sparse(model):
        return {"exact": 1.0}
    if text.nsa_variant == "released":
        return {}
    sizes = {name: getattr(text, name) for name in ("block_size", "block_counts", "window_size")}
    budget = attention_budget(types, **sizes)
    return {
        "exact": budget.fraction,
        "without_compression": budget.without_compression,
        "formula": paper_fraction(len(types), **sizes),
    }


class _Row:
    def __init__(self):
        self.scores: list[int] = []
        self.attention: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0

    def add(self, model, processor, inputs, batch, types, max_new_tokens) -> None:
        """Answer a batch with the model as it is now."""
        if runs_method(model):
            baselines.reset_pairs(model)
        tokenizer = processor.tokenizer
        synchronize(model.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # A checkpoint's own, which greedy decoding has no use for and would be warned of.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        synchronize(model.device)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.scores += [_plain(question.score(text)) for question, text in zip(batch, answers, strict=True)]
        if runs_method(model):
            self.attention += [{"exact": pairs.fraction} for pairs in baselines.pairs_by_sample(model)]
        else:
            self.attention += [attention_shares(model, row) for row in types]

    def numbers(self, questions: Sequence[Question]) -> dict[str, Any]:
        attention = {
            name: round(sum(prompt[name] for prompt in self.attention) / len(self.attention), 6)
            for name in self.attention[0]
        }
        return {
            **shares(questions, self.scores),
            "scores": self.scores,
            "attention": attention,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
        }


def _numbers(right: float, total: float) -> dict[str, Any]:
    low, high = wilson(right, total)
    return {"right": right, "total": total} | {
        name: round(value, 6) for name, value in (("share", right / total), ("low", low), ("high", high))
    }


def _plain(score: float) -> float:
    """Whole numbers as such, for short files."""
    return int(score) if score == int(score) else score


def _counts(scores: Sequence[int]) -> dict[str, int]:
    return {"right": sum(scores), "total": len(scores)}
