"""What an analysis asks: lines of a folder of videos, or documents of a task of lmms-eval."""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synthetic.scenes import NUMBER_WORDS

TASKS = Path(__file__).resolve().parent.parent / "eval" / "tasks"
"""Of this repository, beside lmms-eval's own."""
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
        judge: of a task of lmms-eval its own scoring, in the place of an answer.
    """

    kind: str
    messages: tuple[dict[str, Any], ...]
    video: str
    answer: str | None = None
    choices: tuple[str, ...] = ()
    seconds: float | None = None
    judge: Callable[[str], float | None] | None = field(default=None, compare=False)

    def check(self) -> None:
        """
        Raises:
            ValueError: there is neither an answer nor a judge.
        """
        if self.answer is None and self.judge is None:
            raise ValueError(f"`answer` of a question about {self.video} is missing: it cannot be scored")

    def score(self, response: str) -> float:
        """From 0 to 1: the judge's, or whether a response names the answer.

        Of choices, the one that a response names first counts, whole words; letters are found by lmms-eval's rule.
        Without choices, a response must begin with the answer, as whole words.

        Raises:
            ValueError: as `check`; or the judge gives no score to a single document.
        """
        self.check()
        if self.judge is not None:
            score = self.judge(response)
            if score is None:
                raise ValueError(f"`questions`: {self.kind} gives a single document no score")
            return score
        if is_letter(self.answer) and all(map(is_letter, self.choices)):
            # Takes seconds to import, and few have letters.
            from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

            # The rule takes a word that begins with a letter for it, too.
            stands_alone = re.search(rf"(?<!\w){self.answer}(?!\w)", response)
            return float(bool(stands_alone) and extract_mcq_answer(response, list(self.choices) or None) == self.answer)
        if not self.choices:
            return float(bool(re.match(re.escape(self.answer) + r"(?!\w|[.,]\d)", response.strip(), re.IGNORECASE)))
        return float(_first_named(response, self.choices) == self.answer.casefold())


def is_letter(text: str) -> bool:
    return bool(re.fullmatch("[A-Z]", text))


def _first_named(response: str, choices: Sequence[str]) -> str:
    """The choice whose first whole occurrence is the earliest, and of these the longest; "" if there is none.

    A digit may be spelt out.
    """
    text, found = response.casefold(), []
    for choice in map(str.casefold, choices):
        spelt = [NUMBER_WORDS[int(choice)]] if choice.isdecimal() and int(choice) < len(NUMBER_WORDS) else []
        for form in (choice, *spelt):
            # Letters and digits end each other: small models run on, as in "green1".
            ends = r"(?<!\d)(?<!\d[.,])", r"(?!\d|[.,]\d)"
            before, after = ends if form[-1].isdecimal() else (r"(?<![^\W\d_])", r"(?![^\W\d_])")
            if place := re.search(before + re.escape(form) + after, text):
                found.append((place.start(), -len(form), choice))
    return min(found)[2] if found else ""


def load(source: str | Path, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of a folder or file of lines, or of a task of lmms-eval.

    Args:
        source: a folder that holds `all.jsonl`, a `.jsonl` file, or the name of a task. A line has `video`, relative
            to its file, and `question`; `answer`, `choices`, `kind` and `seconds` as far as they are known.
        limit: of each kind so many, chosen by the seed. Of a task, nothing else is read.
    Raises:
        ValueError: no such source, a line that is none, or a limit that is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be positive, got {limit!r}")
    path = Path(source)
    if path.is_dir():
        path = path / LINES
    if path.is_file():
        found = ((question.kind, lambda question=question: question) for question in _of_lines(path))
    elif path.suffix or path.parent != Path("."):
        raise ValueError(f"`questions` = {str(source)!r}: there is no such file")
    else:
        found = _of_task(str(source))
    kinds: dict[str, list[Callable[[], Question]]] = {}
    for kind, build in found:
        kinds.setdefault(kind, []).append(build)
    if not kinds:
        raise ValueError(f"`questions` = {str(source)!r} holds no question")
    chance = random.Random(seed)
    if limit is not None:
        kinds = {kind: chance.sample(builds, min(limit, len(builds))) for kind, builds in kinds.items()}
    return [build() for builds in kinds.values() for build in builds]


def _of_lines(path: Path) -> Iterator[Question]:
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
            video, asked = (path.parent / line["video"]).resolve(), line["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected JSON with `video` and `question`, got {text!r}") from error
        if not video.is_file():
            raise ValueError(f"{where}: there is no video {str(video)!r}")
        answer, choices = line.get("answer"), tuple(map(str, line.get("choices") or ()))
        answer = None if answer is None or not str(answer).strip() else str(answer).strip()
        if answer is not None and choices and answer.casefold() not in map(str.casefold, choices):
            raise ValueError(f"{where}: `answer` must be one of `choices` = {list(choices)}, got {answer!r}")
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": asked}]
        message = {"role": "user", "content": content}
        kind, seconds = str(line.get("kind", "all")), line.get("seconds")
        yield Question(kind, (message,), str(line["video"]), answer, choices, seconds)


def _of_task(name: str) -> Iterator[tuple[str, Callable[[], Question]]]:
    """Of each document its task, and what builds the question. Its answer is judged as the task judges it."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager("ERROR", include_path=str(TASKS), model_name="videonsa")
    if name not in manager.all_tasks:
        raise ValueError(f"`questions` = {name!r} is neither a folder, nor a .jsonl file, nor a task of lmms-eval")
    for task_name, task in _flat(get_task_dict([name], manager, task_type="chat")):
        for number in range(len(task.eval_docs)):
            yield task_name, partial(_of_document, task_name, task, number)


def _of_document(task_name: str, task: Any, number: int) -> Question:
    from videonsa_eval.prompts import to_messages
    from videonsa_eval.report import main_metric, score_of

    doc = task.eval_docs[number]
    messages = to_messages(task.doc_to_messages(doc))
    parts = (part for message in messages for part in message["content"] if part["type"] != "text")
    media = [part[part["type"]] for part in parts]
    is_files = media and all(isinstance(item, str) for item in media)
    metric, in_percent = main_metric(task_name, task.dump_config())

    def judge(response: str) -> float | None:
        score = score_of(task.process_results(doc, [response]).get(metric))
        return score / 100 if score is not None and in_percent and score > 1 else score

    return Question(task_name, tuple(messages), " ".join(media) if is_files else f"{task_name}/{number}", judge=judge)


def _flat(tasks: dict) -> Iterator[tuple[str, Any]]:
    """Groups hold dictionaries of tasks."""
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task


def one_per_video(questions: Iterable[Question]) -> list[Question]:
    """The first about each: of what comes before the question, such as gates of video tokens, others say the same."""
    return list({question.video: question for question in reversed(list(questions))}.values())[::-1]


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
