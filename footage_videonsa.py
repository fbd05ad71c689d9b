"""Where the frames of a reading came from, so that pictures of them can be made again.

A reading keeps numbers, not pictures: of each video the seconds of its frames, and what it was read from. That is a
reference to what the caller gave, a path or an array; of footage that `extend` brought, paths alone, since a camera's
frames would fill the memory.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

try:
    from .prompt_videonsa import OpenVideo, Prompt, kind_of, open_stream
    from .reading_files_videonsa import media_fingerprint
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from prompt_videonsa import OpenVideo, Prompt, kind_of, open_stream
    from reading_files_videonsa import media_fingerprint

_PLACES = ("video", "url", "path")  # where a part of a conversation may hold its video


@dataclass(frozen=True)
class Footage:
    """Frames that were read of one file or array.

    Attributes:
        times: seconds of the frames in the video.
        indices: their numbers in the file or array.
        offset: second of the video at which the file or array begins.
        digest: of it, as in `media_fingerprint`; "" where that is not known.
        part: of the conversation, with the video itself; `None` where it was not kept.
    """

    times: tuple[float, ...] = field(repr=False)
    indices: tuple[int, ...] = field(repr=False)
    offset: float
    digest: str
    part: Mapping[str, Any] | None = field(repr=False)

    @classmethod
    def of(cls, stream, part: Mapping[str, Any] | None, digest: str = "", offset: float = 0.0) -> "Footage":
        """Of a `VideoStream` that was read."""
        times = tuple(offset + time for time in stream.times)
        return cls(times, stream.plan.frame_indices, offset, digest, None if part is None else bare(part))

    @property
    def path(self) -> str | None:
        """Of a file."""
        video = None if self.part is None else media_in(self.part)
        return os.fspath(video) if isinstance(video, (str, os.PathLike)) else None

    def first(self, count: int) -> "Footage":
        return replace(self, times=self.times[:count], indices=self.indices[:count])

    def to_dict(self) -> dict[str, Any]:
        """What is kept on disk: of the video itself, its path."""
        return {name: getattr(self, name) for name in ("times", "indices", "offset", "digest", "path")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], part: Mapping[str, Any] | None = None) -> "Footage":
        if part is None and values["path"] is not None:
            part = {"type": "video", "video": values["path"]}
        return cls(tuple(values["times"]), tuple(values["indices"]), values["offset"], values["digest"], part)


def bare(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a conversation with its video and without options."""
    return {"type": "video"} | {name: part[name] for name in _PLACES if part.get(name) is not None}


def media_in(part: Mapping[str, Any]) -> Any:
    return next((part[name] for name in _PLACES if part.get(name) is not None), None)


@dataclass
class ReadVideo:
    """A video in a reading.

    Attributes:
        first_token: of its tokens among those of the reading.
        shape: its size, steps, and rate; of a video that can be extended, the reading's `video` itself.
        footage: what it was read from, in order.
    """

    first_token: int
    shape: OpenVideo
    footage: list[Footage]

    @property
    def times(self) -> list[float]:
        """Seconds of its frames."""
        return [time for part in self.footage for time in part.times]

    def spans(self, frames_per_step: int) -> list[tuple[float, float]]:
        """(start, end) in seconds of each of its steps; the last one ends when the next would have begun."""
        starts = self.times[::frames_per_step]
        if not starts:
            return []
        last = self.times[-1] + 1 / self.shape.fps if len(self.times) % frames_per_step else None
        return [*zip(starts, [*starts[1:], last or starts[-1] + self.shape.seconds_per_step], strict=True)]

    def cut(self, frames: int) -> None:
        """Forget all but so many of its frames."""
        kept = []
        for part in self.footage:
            if (part := part.first(frames)).times:
                kept.append(part)
            frames -= len(part.times)
        self.footage = kept

    def frames(self, processor, numbers: Sequence[int], video: Any = None) -> torch.Tensor:
        """Frames of these numbers, decoded once more.

        Args:
            numbers: ascending.
            video: what to decode, where that is not what was read. Frames are found by their time in it, unless its
                content is that of what was read.
        Returns:
            (n, 3, height, width), uint8, in the size in which they were read.
        Raises:
            ValueError: what was read is not there any more, or was not kept, and `video` is not given or too short.
        """
        return torch.cat([frames for frames, _ in self._decoded(processor, numbers, video)])

    def patches(self, processor, numbers: Sequence[int], video: Any = None) -> torch.Tensor:
        """The same frames as patches for the vision tower, (patches, pixels); an odd last one fills its step alone."""
        parts = self._decoded(processor, numbers, video)
        return parts[0][1].cut(torch.cat([frames for frames, _ in parts]))

    def _decoded(self, processor, numbers: Sequence[int], video: Any) -> list[tuple[torch.Tensor, Any]]:
        """Frames, and the `VideoStream` that they come from."""
        found, first = [], 0
        for part in self.footage:
            wanted = [number - first for number in numbers if first <= number < first + len(part.times)]
            first += len(part.times)
            if wanted:
                found.append(self._decode(processor, part, wanted, video))
        return found

    def to_dict(self) -> dict[str, Any]:
        shape = {name: value for name, value in vars(self.shape).items() if name != "tail"}
        return {"first_token": self.first_token, "shape": shape, "footage": [part.to_dict() for part in self.footage]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], part: Mapping[str, Any] | None = None) -> "ReadVideo":
        """part: of a conversation, with the video that was read first."""
        shape = OpenVideo(**values["shape"] | {"size": tuple(values["shape"]["size"])}, tail=None)
        first, *more = values["footage"]
        footage = [Footage.from_dict(first, None if part is None else bare(part)), *map(Footage.from_dict, more)]
        return cls(values["first_token"], shape, footage)

    def _decode(self, processor, footage: Footage, wanted: list[int], video: Any) -> tuple[torch.Tensor, Any]:
        indices = [footage.indices[number] for number in wanted]
        times = [footage.times[number] for number in wanted]
        part = footage.part if video is None else {"type": "video", "video": video}
        if part is None:
            raise ValueError(
                f"the frames at second {times[0]:.2f} were not kept, since they were read from memory: "
                "pass `video`, such as a recording of the whole video"
            )
        is_same = not footage.digest or media_fingerprint(part)["digest"] == footage.digest
        if video is None and not is_same:
            name = footage.path or f"the {media_fingerprint(part)['name']} that was read"
            raise ValueError(f"{name} is not there, or has changed since it was read: pass `video`, where it is now")
        try:
            stream = open_stream(processor, part, self.shape.height, self.shape.width, self.shape.fps)
        except ValueError as error:
            if video is not None:
                raise
            raise ValueError(f"{error}: pass `video`, where it is now") from error
        if video is not None and (not is_same or not footage.digest):
            source = stream.clip.source
            if times[-1] >= source.duration:
                raise ValueError(
                    f"`video` = {source.name} has {source.duration:.2f} seconds, and second {times[-1]:.2f} is wanted"
                )
            indices = source.frames_at(times)
        stream.plan = replace(stream.plan, frame_indices=tuple(indices), num_frames=len(indices))
        return torch.cat(list(stream.frames(len(indices)))), stream


def videos_of(prompt: Prompt, num_tokens: int, media: Sequence[Mapping[str, Any]]) -> list[ReadVideo]:
    """The videos of a prompt of which so many tokens were read, as far as they were; media: their fingerprints."""
    parts = [part for part in prompt.media if kind_of(part) == "video"]
    digests = [one["digest"] for one in media if one["kind"] == "video"]
    spans = [span for span in prompt.spans if span.kind == 2 and span.start < num_tokens]
    videos = []
    for number, span in enumerate(spans):
        stream = prompt.streams[number]
        plan = stream.plan
        shape = OpenVideo(
            start=int(prompt.positions[0, 0, span.start]),
            size=tuple(span.grid[1:]),
            height=plan.height,
            width=plan.width,
            steps=min(span.tokens, num_tokens - span.start) // span.step_tokens,
            seconds_per_step=prompt.seconds[number],
            fps=plan.fps,
            tail=None,
        )
        video = ReadVideo(span.start, shape, [Footage.of(stream, parts[number], digests[number])])
        video.cut(shape.steps * stream.temporal_patch_size)
        videos.append(video)
    return videos
