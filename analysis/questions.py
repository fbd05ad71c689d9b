"""What an analysis asks: lines of a folder of videos, or documents of a task of lmms-eval."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synthetic.scenes import parse_answer

LINES = "all.jsonl"
"""What `eval/draw_benchmark.py` calls the file of a folder's questions."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and what is known of its answer.

    Attributes:
        kind: what results are grouped by: the line's `kind`, or the name of the task.
        messages: for `processor.apply_chat_template`.
        video: what tells videos apart, such as a line's `video`: questions of one video are not independent.
        answer: right, or `None` where nobody says.
        choices: what the answer is one of; empty where it can be anything.
        seconds: length of the video, where known.
    """

    kind: str
    messages: tuple[dict[str, Any], ...]
    video: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    seconds: float | None = None

    def is_right(self, response: str) -> bool:
        """Whether a response names the answer first of all choices; without choices, whether it begins with it.

        Raises:
            ValueError: there is no answer.
        """
        if self.answer is None:
            raise ValueError(f"`answer` of a question about {self.video} is missing: it cannot be scored")
        if self.choices:
            return parse_answer(response, [choice.lower() for choice in self.choices]) == self.answer.lower()
        return response.strip().lower().startswith(self.answer.strip().lower())


def load(source: str | Path, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of a folder or file of lines, or of a task of lmms-eval.

    Args:
        source: a folder that holds `all.jsonl`, a `.jsonl` file, or the name of a task. A line has `video`, relative
            to its file, and `question`; `answer`, `choices`, `kind` and `seconds` as far as they are known.
        limit: of each kind so many, chosen by the seed.
    Raises:
        ValueError: no such source, a line that is none, or a limit that is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be positive, got {limit!r}")
    path = Path(source)
    if path.is_dir():
        path = path / LINES
    if path.is_file():
        questions = list(_of_lines(path))
    elif path.suffix or path.parent != Path("."):
        raise ValueError(f"`questions` = {str(source)!r}: there is no such file")
    else:
        questions = list(_of_task(str(source)))
    if not questions:
        raise ValueError(f"`questions` = {str(source)!r} holds no question")
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.kind, []).append(question)
    if limit is None:
        return [question for of_kind in kinds.values() for question in of_kind]
    chance = random.Random(seed)
    return [question for of_kind in kinds.values() for question in chance.sample(of_kind, min(limit, len(of_kind)))]


def _of_lines(path: Path) -> Iterator[Question]:
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            video, asked = (path.parent / line["video"]).resolve(), line["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected JSON with `video` and `question`, got {text!r}"
            ) from error
        if not video.is_file():
            raise ValueError(f"{path}, line {number}: there is no video {str(video)!r}")
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": asked}]
        yield Question(
            str(line.get("kind", "all")),
            ({"role": "user", "content": content},),
            str(line["video"]),
            None if line.get("answer") is None else str(line["answer"]),
            tuple(map(str, line.get("choices") or ())),
            line.get("seconds"),
        )


def _of_task(name: str) -> Iterator[Question]:
    from lmms_eval.tasks import TaskManager, get_task_dict

    from videonsa_eval.prompts import shared_part, to_messages

    manager = TaskManager()
    if name not in manager.all_tasks:
        raise ValueError(f"`questions` = {name!r} is neither a folder, nor a .jsonl file, nor a task of lmms-eval")
    for task_name, task in _flat(get_task_dict([name], manager)):
        for number, doc in enumerate(task.eval_docs):
            messages = to_messages(task.doc_to_messages(doc))
            target = task.doc_to_target(doc)
            answer = target if isinstance(target, str) else None
            yield Question(task_name, tuple(messages), str(shared_part(messages) or number), answer)


def _flat(tasks: dict) -> Iterator[tuple[str, Any]]:
    """Groups hold dictionaries of tasks."""
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task


def prepare(processor, questions: Sequence[Question], **video_options) -> dict[str, torch.Tensor]:
    """A batch for `model.generate` or `forward`, padded on the left."""
    processor.tokenizer.padding_side = "left"
    return dict(
        processor.apply_chat_template(
            [list(question.messages) for question in questions],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            **video_options,
        )
    )


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """`size` at a time, of one kind each."""
    batch: list[Question] = []
    for question in questions:
        if batch and (len(batch) == size or batch[0].kind != question.kind):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch
