"""The manifest: which records are trained on, found out once, before anything is decoded.

Every record is checked and every video looked at (its packets are listed, one frame is decoded). The records that pass
are written to a JSONL file in one form, with their length in tokens, and a report tells what became of the others.
Training reads the manifest by line, so that memory does not grow with the data.
"""

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .records import BAD_REASONS, BadRecordError, Record, parse_record, read_records

logger = logging.getLogger(__name__)

_EXAMPLES = 20  # of each kind of bad record, in the report


@dataclass(frozen=True)
class DataOptions:
    """What is trained on.

    Args:
        video_folder: what relative paths of videos are relative to.
        fps: frames per second to sample.
        min_frames, max_frames: keep conversations whose videos have, sampled at `fps`, at least and at most so many
            frames; no limit where None.
        max_pixels_per_frame: larger frames are shrunk to this.
        max_tokens: longer samples, text and video together, are left out.
        max_bad_share: stop if a larger share of the records is bad.
        eval_share: share of the videos that is held out, with all their records, for evaluation.
        seed: of the choice of held-out videos.
    Raises:
        ValueError: a value out of range.
    """

    video_folder: str = "."
    fps: float = 4.0
    min_frames: int | None = None
    max_frames: int | None = None
    max_pixels_per_frame: int = 64 * 28 * 28
    max_tokens: int = 36 * 1024
    max_bad_share: float = 0.01
    eval_share: float = 0.0
    seed: int = 42

    def __post_init__(self):
        for name in ("fps", "max_pixels_per_frame", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)!r}")
        if self.min_frames and self.max_frames and self.min_frames > self.max_frames:
            raise ValueError(f"`min_frames` ({self.min_frames}) must not exceed `max_frames` ({self.max_frames})")
        for name in ("max_bad_share", "eval_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a share, at least 0 and less than 1, got {getattr(self, name)!r}")
        if not Path(self.video_folder).is_dir():
            raise ValueError(f"`video_folder`: there is no folder {self.video_folder}")

    def takes(self, frames: int) -> bool:
        """Whether a video of so many sampled frames is trained on."""
        return (self.min_frames or 0) <= frames <= (self.max_frames or frames)

    def processor_options(self) -> dict[str, Any]:
        """Keywords of a processor call that makes no video smaller than planned here."""
        return {
            "fps": self.fps,
            "max_pixels_per_frame": self.max_pixels_per_frame,
            "max_total_tokens": self.max_tokens,
        }


@dataclass
class DataReport:
    """What became of the records; written as JSON beside the manifest.

    Args:
        key: identifies sources and options.
        records: how many were read.
        kept, held_out: how many are trained on and evaluated on.
        outside_frames: how many `min_frames` and `max_frames` left out.
        bad: how many are bad, by reason (a key of `BAD_REASONS`).
        examples: some messages for each reason.
    """

    key: str
    records: int = 0
    kept: int = 0
    held_out: int = 0
    outside_frames: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add_bad(self, reason: str, message: str) -> None:
        self.bad[reason] = self.bad.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(message)

    def __str__(self) -> str:
        text = f"{self.records} records: {self.kept} to train on, {self.held_out} held out"
        if self.outside_frames:
            text += f", {self.outside_frames} outside of min_frames and max_frames"
        for reason, count in self.bad.items():
            text += f"; {count} {reason} ({BAD_REASONS[reason]}), such as {self.examples[reason][0]!r:.300}"
        return text


class Manifest:
    """Records that passed, one line each, and their lengths.

    Attributes:
        tokens: (records,) int64, text and video tokens of each.
        report: of the data it comes from.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.offsets, self.tokens = np.load(self.path.with_suffix(".npy"))
        self.report = _read_report(self.path.parent)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            return Record(**json.loads(file.readline()))


def load_or_build_manifests(
    sources: Sequence[str],
    folder: str | Path,
    processor,
    options: DataOptions,
    *,
    num_workers: int = 0,
    must_be_unchanged: bool = False,
) -> tuple[Manifest, Manifest | None]:
    """The manifests of `sources` in `folder`: to train on, and held out for evaluation where there is an `eval_share`.

    A folder that holds the manifests of the same sources and options is used as it is.

    Args:
        sources: files of records, see `read_records`.
        processor: a `VideoNSAProcessor`.
        num_workers: processes that look at videos; 0 is this one.
        must_be_unchanged: refuse to replace other manifests: a resumed run would see other samples.
    Raises:
        ValueError: a source cannot be read, too large a share of the records is bad, none is left, or the manifests
            would change and must not.
    """
    folder = Path(folder)
    key = _key(sources, processor, options)
    names = ["train.jsonl", *(["held_out.jsonl"] if options.eval_share else [])]
    known = _read_report(folder).key if (folder / "report.json").is_file() else None
    if known == key:
        report = _read_report(folder)
    elif must_be_unchanged and known:
        raise ValueError(
            f"{folder}: the run to be resumed was made with other data: a file of {list(sources)} or one of "
            f"{', '.join(asdict(options))} has changed. Start with another output_dir"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        report = _build(sources, folder, processor, options, key, num_workers)
    logger.info("%s: %s", folder, report)
    manifests = [Manifest(folder / name) for name in names]
    return manifests[0], (manifests[1] if len(manifests) > 1 else None)


def _key(sources: Sequence[str], processor, options: DataOptions) -> str:
    """Changes with the sources, the options, and what else decides about lengths."""
    # The allowed share of bad records decides nothing about a manifest that is there.
    chosen = {**asdict(options), "max_bad_share": None, "video_folder": str(Path(options.video_folder).resolve())}
    tokenizer = hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    facts: list[Any] = [chosen, processor.chat_template, processor.min_pixels_per_frame, tokenizer]
    for source in sources:
        if not Path(source).is_file():
            raise ValueError(f"{source}: there is no such file of records")
        status = os.stat(source)
        facts.append([str(Path(source).resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build(sources, folder: Path, processor, options: DataOptions, key: str, num_workers: int) -> DataReport:
    report, plans = DataReport(key), _plan_videos(sources, processor, options, num_workers)
    held_out = _choose_held_out(plans, options)
    with ExitStack() as stack:
        writers = [stack.enter_context(_Writer(folder / f"{name}.jsonl")) for name in ("train", "held_out")]
        for source, number, record in _parsed(sources, processor, options):
            report.records += 1
            try:
                tokens = _count_tokens(record, plans, processor, options)
            except BadRecordError as error:
                report.add_bad(error.reason, f"{source}, record {number}: {error}")
                continue
            if tokens is None:
                report.outside_frames += 1
            else:
                writers[not held_out.isdisjoint(record.videos)].write(record, tokens)
        report.kept, report.held_out = (len(writer.rows) for writer in writers)
        # Without its key, the report says that the manifests are not there.
        _write_report(folder, replace(report, key=""))
        bad = sum(report.bad.values())
        if bad > options.max_bad_share * report.records:
            raise ValueError(
                f"{bad} of {report.records} records are bad, more than max_bad_share={options.max_bad_share}. "
                f"{report}; see {folder / 'report.json'}"
            )
        if not report.kept:
            hint = f" (eval_share={options.eval_share} holds out one video at least)" if options.eval_share else ""
            raise ValueError(f"no record is left to train on{hint}. {report}; see {folder / 'report.json'}")
        for writer in writers:
            writer.finish()
    _write_report(folder, report)
    return report


def _count_tokens(record, plans, processor, options: DataOptions) -> int | None:
    """Tokens of a record; None where `min_frames` and `max_frames` leave it out."""
    if isinstance(record, BadRecordError):
        raise record
    counts = [plans[video] for video in record.videos]
    for count in counts:
        if isinstance(count, str):
            raise BadRecordError("unreadable_video", count)
    if not all(options.takes(frames) for frames, _ in counts):
        return None
    text = processor.apply_chat_template(record.messages, tokenize=False)
    length = len(processor.tokenizer(text)["input_ids"]) + sum(tokens - 1 for _, tokens in counts)
    if length > options.max_tokens:
        raise BadRecordError("too_long", f"{length} tokens, more than max_tokens={options.max_tokens}")
    return length


def _parsed(sources, processor, options: DataOptions) -> Iterator[tuple[str, int, Record | BadRecordError]]:
    control_tokens = sorted(set(processor.tokenizer.get_added_vocab()))
    for source in sources:
        for number, entry in enumerate(read_records(source)):
            try:
                yield source, number, parse_record(entry, options.video_folder, control_tokens)
            except BadRecordError as error:
                yield source, number, error


def _plan_videos(sources, processor, options: DataOptions, num_workers: int) -> dict[str, tuple[int, int] | str]:
    """(frames, tokens) of every video that a record names, or what is wrong with it."""
    videos: dict[str, None] = {}  # a set in the order of the records
    for _, _, record in _parsed(sources, processor, options):
        videos |= dict.fromkeys(record.videos if isinstance(record, Record) else ())
    plan = partial(_plan_video, processor=processor, options=options)
    if not num_workers:
        return dict(map(plan, videos))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processing_videonsa", __name__])
    with context.Pool(num_workers) as pool:
        return dict(pool.imap_unordered(plan, videos, chunksize=16))


def _plan_video(path: str, processor, options: DataOptions) -> tuple[str, tuple[int, int] | str]:
    try:
        # No budget here: what exceeds `max_tokens` is left out, not shrunk.
        plan = processor.plan_video(path, **{**options.processor_options(), "max_total_tokens": 1 << 40})
    except Exception as error:  # whatever a file does to its reader, it is one bad video; their share is watched
        return path, f"{type(error).__name__}: {error}"
    return path, (plan.num_frames, plan.tokens)


def _choose_held_out(plans: dict[str, tuple[int, int] | str], options: DataOptions) -> set[str]:
    """Videos to evaluate on: a share of the good ones, at least one, by a hash of the path in the folder of videos."""
    good = [video for video, plan in plans.items() if not isinstance(plan, str) and options.takes(plan[0])]

    def order(video: str) -> bytes:
        return hashlib.sha256(f"{options.seed}/{os.path.relpath(video, options.video_folder)}".encode()).digest()

    count = max(1, round(options.eval_share * len(good))) if options.eval_share else 0
    return set(sorted(good, key=order)[:count])


class _Writer:
    """A manifest that appears under its name when it is finished, and not at all if that does not come to pass."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def __enter__(self) -> "_Writer":
        self.file = self.path.with_suffix(".tmp").open("wb")
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.path.with_suffix(".tmp").unlink(missing_ok=True)

    def write(self, record: Record, tokens: int) -> None:
        self.rows.append((self.file.tell(), tokens))
        self.file.write(json.dumps(asdict(record)).encode() + b"\n")

    def finish(self) -> None:
        self.file.close()
        np.save(self.path.with_suffix(".npy"), np.array(self.rows, dtype=np.int64).reshape(-1, 2).T)
        os.replace(self.path.with_suffix(".tmp"), self.path)


def _write_report(folder: Path, report: DataReport) -> None:
    temporary = folder / "report.tmp"
    temporary.write_text(json.dumps(asdict(report), indent=2))
    os.replace(temporary, folder / "report.json")


def _read_report(folder: Path) -> DataReport:
    return DataReport(**json.loads((folder / "report.json").read_text()))
