"""Video files, read through PyAV: listed first, so that frames can be chosen, then decoded where they are needed.

`FileClip` lists the packets of a file (`listing_videonsa.py`) and looks at one frame. `FileClip.stream` gives out the
chosen frames, resized, while it decodes, and `FileClip.read` all of them at once; how, and what happens to damaged
files, is said in `decoding_videonsa.py`.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

try:
    from .budget_videonsa import VideoPlan, VideoSource, check_positive
    from .decoding_videonsa import WAITING_BYTES, Decoder, Picture, Pictures, read_in_order
    from .listing_videonsa import DamagedVideoError, VideoFile
    from .rgb_videonsa import RgbConverter, shown_size
    from .sources_videonsa import resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoPlan, VideoSource, check_positive
    from decoding_videonsa import WAITING_BYTES, Decoder, Picture, Pictures, read_in_order
    from listing_videonsa import DamagedVideoError, VideoFile
    from rgb_videonsa import RgbConverter, shown_size
    from sources_videonsa import resolve_source

Resize = Callable[[torch.Tensor, VideoPlan], torch.Tensor]
"""(T, 3, H, W) frames to the height and width of a plan."""


class FileClip:
    """A video file, listed and not decoded; see `frames_videonsa.open_clip`.

    Args:
        source: path, or a seekable binary file.
        every_frame: no frame may be left out.
        name: of the file in messages; a path by default.
    Raises:
        ValueError: there is no video to read, or the file is cut short.
    """

    def __init__(self, source: Any, every_frame: bool, name: str | None = None):
        self.file = VideoFile(source, name)
        self.name = self.file.name
        self.listing = self.file.list()
        if self.listing.needs_decoding:
            with Decoder(self.file, self.listing) as decoder:
                self.listing.order_by([number for number, frame in decoder.all() if frame is not None])
        with Decoder(self.file, self.listing, careful=True) as decoder:
            first = next((frame for _, frame in decoder.all() if frame is not None), None)
        if first is None:
            raise ValueError(f"{self.name}: no frame can be decoded; damaged, or its codec is not supported")
        self.listing.start_at(first.pts)
        if first.format.has_palette:
            # A palette is stored once, when it changes: no later frame can be decoded by itself.
            self.listing.starts = [0]
        fps, timestamps, notes = self.listing.timing()
        height, width = shown_size(first, self.file.pixel_aspect)
        self.source = VideoSource(
            num_frames=len(self.listing.numbers),
            fps=fps,
            height=height,
            width=width,
            timestamps=timestamps,
            presampled=every_frame,
            may_drop_frames=not every_frame,
            name=self.name,
            notes=notes,
        )

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        return metadata_of(self.source, plan, backend="pyav")

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        """The planned frames, (T, 3, plan.height, plan.width) uint8.

        Raises:
            DamagedVideoError: too much of them is damaged, or the file vanished or changed; a ValueError.
        """
        return self._read(plan.frame_indices, (plan.height, plan.width), None, lambda frames: resize(frames, plan))

    def stream(self, plan: VideoPlan, resize: Resize, batch: int) -> Iterator[torch.Tensor]:
        """The planned frames in their order, given out while the file is decoded.

        Beside a batch, a few dozen frames are in memory, however long the video is. Closing the iterator closes the
        file; any thread may go on with it, one at a time.

        Args:
            batch: frames in a piece.
        Returns:
            an iterator of (n, 3, plan.height, plan.width) uint8, n == batch except for the last.
        Raises:
            ValueError: `batch` is no positive integer.
            DamagedVideoError: by the iterator, as `read`, after all frames before its `second`, of which the last piece
                may be shorter.
        """
        batch, size = check_batch(batch), (plan.height, plan.width)
        return self._pieces(plan.frame_indices, size, None, lambda frames: resize(frames, plan), batch)

    def read_unresized(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames with these numbers in the size in which the first is shown, (T, 3, H, W) uint8."""
        size = self.source.height, self.source.width
        return self._read(indices, size, size, lambda frames: frames)

    def _read(
        self,
        indices: Sequence[int],
        size: tuple[int, int],
        converted_size: tuple[int, int] | None,
        resize: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The frames of `_pieces`, of indices in any order."""
        places = sorted(range(len(indices)), key=indices.__getitem__)
        frames = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
        done, batch = 0, max(1, WAITING_BYTES // frames[:1].numel())
        for piece in self._pieces([indices[place] for place in places], size, converted_size, resize, batch):
            frames.numpy()[places[done : done + len(piece)]] = piece.numpy()
            done += len(piece)
        return frames

    def _pieces(
        self,
        indices: Sequence[int],
        size: tuple[int, int],
        converted_size: tuple[int, int] | None,
        resize: Callable[[torch.Tensor], torch.Tensor],
        batch: int,
    ) -> Iterator[torch.Tensor]:
        """Frames of ascending indices and a size, made of frames of `converted_size` (None: as stored) by `resize`."""
        convert = RgbConverter(self.name)
        pictures = Pictures(lambda frame: convert(frame, converted_size), resize)
        piece: list[Picture] = []

        def stacked() -> torch.Tensor:
            frames = torch.empty((len(piece), 3, *size), dtype=torch.uint8)
            for frame, picture in zip(frames.numpy(), piece, strict=True):
                frame[:] = picture.array()
            piece.clear()
            return frames

        try:
            with closing(
                read_in_order(self.file, self.listing, Counter(indices), self.source.second, pictures)
            ) as reading:
                for times, picture in reading:
                    for _ in range(times):
                        piece.append(picture)
                        if len(piece) == batch:
                            yield stacked()
        except DamagedVideoError:
            if piece:
                yield stacked()
            raise
        if piece:
            yield stacked()


def check_batch(batch: Any) -> int:
    """How many frames a piece of a stream has; a ValueError if that is no positive integer."""
    if batch is None:
        raise ValueError("`batch` must be a positive integer, got None")
    return check_positive("batch", batch)


def metadata_of(source: VideoSource, plan: VideoPlan, backend: str | None) -> VideoMetadata:
    """transformers' metadata of the planned frames of a source."""
    return VideoMetadata(
        total_num_frames=source.num_frames,
        fps=source.fps,
        width=source.width,
        height=source.height,
        duration=source.num_frames / source.fps,
        video_backend=backend,
        frames_indices=list(plan.frame_indices),
    )


def read_for_qwen_vl_utils(part: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """A reader in the form of `qwen_vl_utils.vision_process.VIDEO_READER_BACKENDS`.

    Args:
        part: a video of a message, with qwen-vl-utils' options.
    Returns:
        frames (T, 3, H, W) uint8; metadata; frames per second after sampling.
    """
    # Not an import statement: transformers' scan of remote code would demand the package of everyone.
    vision_process = importlib.import_module("qwen_vl_utils.vision_process")
    given = resolve_source(part["video"], argument="video")
    clip = FileClip(given.readable, False, given.name)
    source = clip.source
    first, last, total = vision_process.calculate_video_frame_range(part, source.num_frames, source.fps)
    count = vision_process.smart_nframes(part, total_frames=total, video_fps=source.fps)
    indices = torch.linspace(first, last, count).round().long().tolist()
    frames = clip.read_unresized(source.frames_at([index / source.fps for index in indices]))
    metadata = {
        "fps": source.fps,
        "frames_indices": indices,
        "total_num_frames": total,
        "video_backend": "pyav",
    }
    return frames, metadata, count / total * source.fps
