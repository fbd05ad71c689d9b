"""From what lmms-eval's tasks ask to what the processor takes, and which prompts have their videos in common."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.protocol import ChatMessages
from loguru import logger
from transformers import GenerationConfig

# What some tasks' YAML sets for other models.
_OF_OTHER_MODELS = ("image_aspect_ratio", "seed", "skip_special_tokens", "visual_cot")
_DEFAULT_MAX_NEW_TOKENS = 128
# What lmms-eval gives every task that names no stop strings. It would cut answers of several paragraphs.
_DEFAULT_UNTIL = ("\n\n",)
# Settings that may go with a KV cache of the prompt's beginning. Others, such as `prompt_lookup_num_tokens`, give wrong
# answers with one in transformers 5.23, without a word.
_FOR_KEPT_CACHES = {
    "do_sample",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
}


def to_messages(raw: Any, *, system_prompt: str | None = None, allow_text_only: bool = False) -> list[dict[str, Any]]:
    """Messages of a task in the form that `processor.apply_chat_template` takes.

    Args:
        raw: what the task's `doc_to_messages` returned.
        system_prompt: replaces the system message.
        allow_text_only: accept prompts without images and videos.
    Raises:
        ValueError: audio, a cut out of a video, or neither image nor video.
    """
    messages, num_media = [], 0
    for message in ChatMessages(messages=raw).messages:
        parts = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
                continue
            if part.type == "audio":
                raise ValueError("the prompt has audio, which the model does not take")
            is_cut = isinstance(part.url, dict) or getattr(part, "start_time", None) or getattr(part, "end_time", None)
            if part.type == "video" and is_cut:
                raise ValueError(f"the prompt has a cut out of a video, which is not supported: {part!r}")
            num_media += 1
            parts.append({"type": part.type, part.type: part.url})
        messages.append({"role": message.role, "content": parts})
    if not num_media and not allow_text_only:
        # Some tasks log a missing video and go on without it.
        raise ValueError(
            "the prompt has neither image nor video: either its file is missing, or the task is one of text alone, "
            "which `allow_text_only=True` permits"
        )
    if system_prompt is not None:
        messages = [message for message in messages if message["role"] != "system"]
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    return messages


def shared_part(messages: Sequence[dict[str, Any]]) -> tuple | None:
    """What the prompt says up to its last image or video, to be compared with other prompts.

    `None` where there is no media, or where it is not files: other objects cannot be compared cheaply.
    """
    parts, end = [], 0
    for message in messages:
        parts.append(("role", message["role"]))
        for part in message["content"]:
            value = part[part["type"]]
            if part["type"] != "text" and not isinstance(value, str):
                return None
            parts.append((part["type"], value))
            if part["type"] != "text":
                end = len(parts)
    return tuple(parts[:end]) or None


@dataclass(frozen=True)
class Job:
    """Requests that are prepared, and answered, together.

    Attributes:
        indices: of the requests.
        is_read: they all start with the same media, and are answered one after the other from one reading of these;
            otherwise they form a batch.
    """

    indices: tuple[int, ...]
    is_read: bool


def plan_jobs(
    shared: Sequence[tuple | None], settings: Sequence[str], batch_size: int, read_all: bool = False
) -> list[Job]:
    """Requests about the same media together, the others in batches of equal settings, in the order of the first.

    Args:
        shared: for each request what it may have in common with others (`shared_part`), or `None`.
        settings: for each request what must be equal within a batch.
        read_all: what one request alone starts with is read too.
    """
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(shared):
        if key is not None:
            groups.setdefault(key, []).append(index)
    jobs = [Job(tuple(group), True) for group in groups.values() if len(group) > 1 or read_all]
    taken = {index for job in jobs for index in job.indices}
    batches: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        if index not in taken:
            batches.setdefault(setting, []).append(index)
    for batch in batches.values():
        jobs += [Job(tuple(batch[i : i + batch_size]), False) for i in range(0, len(batch), batch_size)]
    return sorted(jobs, key=lambda job: job.indices[0])


@dataclass(frozen=True)
class GenerationSettings:
    """How a task wants its answers: keywords of `model.generate`, and strings that end an answer."""

    options: dict[str, Any]
    until: tuple[str, ...]

    @classmethod
    def of_task(cls, given: dict[str, Any]) -> "GenerationSettings":
        """Read a task's `generation_kwargs`.

        As in lmms-eval's own models, a temperature decides whether to sample, whatever `do_sample` says: tasks set
        `do_sample=False`, and `--gen_kwargs temperature=0.7` would have no effect.

        Raises:
            ValueError: a keyword that is neither one of `GenerationConfig` nor known to be meant for other models.
        """
        options, until = {"max_new_tokens": _DEFAULT_MAX_NEW_TOKENS}, []
        for name, value in given.items():
            if name in ("until", "stop_sequences"):
                until += [value] if isinstance(value, str) else list(value or ())
            elif name in _OF_OTHER_MODELS:
                logger.debug(f"generation_kwargs: {name}={value!r} is for other models and has no effect")
            elif not hasattr(GenerationConfig(), name):
                raise ValueError(f"generation_kwargs: `{name}`={value!r} is not a keyword of transformers' generation")
            else:
                options[name] = value
        if options.get("temperature") is not None:
            options["do_sample"] = options["temperature"] > 0
        options.setdefault("do_sample", False)
        if not options["do_sample"]:
            # The checkpoint's own defaults would be taken for settings without effect.
            options |= {"temperature": None, "top_p": None, "top_k": None}
        return cls(options, () if tuple(until) == _DEFAULT_UNTIL else tuple(string for string in until if string))

    @property
    def may_continue_cache(self) -> bool:
        """Whether the answer may start from a KV cache of the prompt's beginning, of one row."""
        is_one_row = all(self.options.get(name) in (None, 1) for name in ("num_beams", "num_return_sequences"))
        return is_one_row and self.options.keys() <= _FOR_KEPT_CACHES

    def finish(self, answer: str) -> str:
        """The answer up to the first string that ends it."""
        for string in self.until:
            answer = answer.split(string, 1)[0]
        return answer

    def __str__(self) -> str:
        return json.dumps([self.options, self.until], sort_keys=True, default=str)


def answer_in_rounds(doc_to_messages: Callable, doc: Any, answer: Callable[[Any], str], most: int = 64) -> list[str]:
    """All answers of a task that asks several times, each time with what was answered before.

    Args:
        doc_to_messages: the task's; from the second round on it returns (messages, is over, answers so far, state).
        answer: from messages to text.
        most: rounds after which the task is taken never to end.
    Raises:
        ValueError: it does not end.
    """
    answers, state, raw = [], None, doc_to_messages(doc)
    for number in range(1, most + 1):
        answers.append(answer(raw))
        reply = doc_to_messages(doc, round_idx=number, previous_output=list(answers), previous_round_info=state)
        raw, is_over, so_far, state = reply
        answers = list(answers if so_far is None else so_far)
        if is_over:
            return answers
    raise ValueError(f"the task did not end after {most} rounds")
