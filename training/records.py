"""Records of training data: LLaVA-Video-178K's conversations and chat messages, brought to one form and checked.

    {"id": "RW587", "video": "academic_source/Charades/RW587.mp4",
     "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}, ...]}

    {"messages": [{"role": "user", "content": [{"type": "video", "video": "my.mp4"}, {"type": "text", "text": "Q"}]},
                  {"role": "assistant", "content": "A"}]}

The first is the format of https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K; the second is that of
`processor.apply_chat_template`. Either may be an element of a JSON list (`.json`) or a line of a JSONL file (`.jsonl`),
and either may name its video at the top, which then comes before the first question. Keys whose value is null are
absent, as for the processor: tables of records (Parquet, Arrow) have every key in every row.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messages_videonsa import without_none

# Why a record cannot be trained on.
BAD_REASONS = {
    "malformed": "not a conversation that ends with an answer, or one with control tokens in it",
    "empty_answer": "an answer without text",
    "no_video": "no video",
    "missing_video": "a video file that does not exist",
    "unreadable_video": "a video that cannot be opened, is cut short, or has no frames",
    "too_long": "more tokens than `max_tokens`",
    "undecodable_video": "frames that could not be decoded, found out during training",
}
_PLACEHOLDER = re.compile(r"\n?(?:<image>|<video>)\n?")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_READ_CHARACTERS = 1 << 20


class BadRecordError(ValueError):
    """A record that cannot be trained on; `reason` is a key of `BAD_REASONS`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """A conversation about one or more videos.

    Args:
        id: for reports.
        messages: as `processor.apply_chat_template` takes them; users' contents are lists of videos and texts.
    """

    id: str
    messages: list[dict[str, Any]]

    @property
    def videos(self) -> list[str]:
        """Paths, in the order of the conversation."""
        parts = [part for message in self.messages if message["role"] == "user" for part in message["content"]]
        return [part["video"] for part in parts if part["type"] == "video"]


def read_records(path: str | Path) -> Iterator[Any]:
    """The records of a file one after another, as JSON has them; a `BadRecordError` in place of a line that is no JSON.

    Memory holds one record at a time.

    Raises:
        ValueError: no such file, another suffix, a list that breaks off.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: a file of records must end in .json (a list) or .jsonl (a record a line)")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of records")
    with path.open(encoding="utf-8") as file:
        yield from _read_lines(file) if path.suffix == ".jsonl" else _read_list(file, path)


def _read_lines(file) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRecordError("malformed", f"line {number} is no JSON: {error}")


def _read_list(file, path: Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    text = file.read(_READ_CHARACTERS).lstrip()
    if not text.startswith("["):
        raise ValueError(f"{path}: a .json file of records must hold a list")
    text = text[1:]
    while True:
        text = text.lstrip().removeprefix(",").lstrip()
        if text.startswith("]"):
            return
        try:
            record, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = file.read(max(_READ_CHARACTERS, len(text)))  # doubling, so that long records are not parsed often
            if not more:
                raise ValueError(f"{path}: the list breaks off, or is no JSON: {error}") from error
            text += more
        else:
            yield record
            text = text[end:]


def parse_record(entry: Any, video_folder: str | Path, control_tokens: Collection[str] = ()) -> Record:
    """Check a record and bring it to the form of `Record`.

    Args:
        entry: as `read_records` yields it.
        video_folder: what relative paths of videos are relative to.
        control_tokens: must not occur in texts, where the tokenizer would take them for its own.
    Raises:
        BadRecordError: reason "malformed", "empty_answer", "no_video" or "missing_video".
    """
    if isinstance(entry, BadRecordError):
        raise entry
    entry = without_none(entry)
    if not isinstance(entry, dict) or ("messages" in entry) == ("conversations" in entry):
        raise BadRecordError("malformed", "a record needs either `messages` or `conversations`")
    videos = entry.get("video") or []
    videos = [videos] if isinstance(videos, str) else videos
    if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
        raise BadRecordError("malformed", f"`video` must be a path or a list of paths, got {entry['video']!r}")
    if "conversations" in entry:
        messages = _from_conversations(entry["conversations"], videos)
    else:
        messages = _from_messages(entry["messages"], videos)
    _check_turns(messages, control_tokens)
    record = Record(str(entry.get("id", "")), messages)
    if not record.videos:
        raise BadRecordError("no_video", "no video in the record")
    for message in messages:
        for part in message["content"] if message["role"] == "user" else ():
            if part["type"] == "video":
                part["video"] = str(Path(video_folder) / part["video"])
                if not Path(part["video"]).is_file():
                    raise BadRecordError("missing_video", f"{part['video']}: there is no such video file")
    return record


def _from_conversations(turns: Any, videos: list[str]) -> list[dict[str, Any]]:
    """LLaVA's turns as chat messages: `<image>` marks where a video is, the beginning where nothing does."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecordError("malformed", "`conversations` must be a list of turns")
    messages = []
    for turn in turns:
        role, text = _ROLES.get(turn.get("from")), turn.get("value")
        if role is None or not isinstance(text, str):
            raise BadRecordError(
                "malformed", f"a turn needs `from` ({', '.join(_ROLES)}) and `value`, got {turn!r:.200}"
            )
        messages.append({"role": role, "content": text})
    places = sum(len(_PLACEHOLDER.findall(turn["content"])) for turn in messages if turn["role"] == "user")
    if places not in (0, len(videos)):
        raise BadRecordError("malformed", f"{places} times <image> for {len(videos)} videos")
    left = list(videos)
    for message in messages:
        if message["role"] == "user":
            texts = _PLACEHOLDER.split(message["content"]) if places else [message["content"]]
            content = [{"type": "video", "video": left.pop(0)} for _ in left[:] if not places]
            for number, text in enumerate(texts):
                content += [{"type": "video", "video": left.pop(0)}] if number else []
                content += [{"type": "text", "text": text}] if text else []
            message["content"] = content
    return messages


def _from_messages(messages: Any, videos: list[str]) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecordError("malformed", "`messages` must be a list of messages")
    result = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES.values():
            raise BadRecordError("malformed", f"`role` must be one of {', '.join(_ROLES.values())}, got {role!r}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
            raise BadRecordError(
                "malformed",
                f"`content` must be a text or a list of texts and videos without options, got {content!r:.200}",
            )
        if role == "user":
            parts = [{"type": "video", "video": video} for video in videos] + [dict(part) for part in parts]
            videos = []
        elif any(part["type"] == "video" for part in parts):
            raise BadRecordError("malformed", f"a video in a message of the {role}")
        else:
            parts = "".join(part["text"] for part in parts)
        result.append({"role": role, "content": parts})
    return result


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind in ("text", "video") and set(part) == {"type", kind} and isinstance(part[kind], str)


def _check_turns(messages: list[dict[str, Any]], control_tokens: Collection[str]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRecordError("malformed", f"users and assistants must take turns and the assistant end, got {roles}")
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and not content.strip():
            raise BadRecordError("empty_answer", "an answer is empty")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for token in control_tokens:
            if any(token in text for text in texts):
                raise BadRecordError("malformed", f"a text holds the control token {token}")
