"""Videos that a call of the processor plans and does not read: patches are made when they are asked for."""

from collections.abc import Callable, Iterator

import torch
from transformers.video_utils import VideoMetadata

try:
    from .budget_videonsa import VideoPlan
    from .frames_videonsa import Clip
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoPlan
    from frames_videonsa import Clip


class VideoStream:
    """A planned video.

    Args:
        clip, plan: what is read, and how.
        resize: of `Clip.stream`.

    Attributes:
        cut: set by the processor: (T, 3, H, W) frames to their patches.
        temporal_patch_size: frames in a patch.
    """

    temporal_patch_size: int = 2
    cut: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, clip: Clip, plan: VideoPlan, resize: Callable):
        self.clip, self.plan, self._resize = clip, plan, resize

    @property
    def metadata(self) -> VideoMetadata:
        return self.clip.metadata(self.plan)

    @property
    def times(self) -> list[float]:
        """Seconds of the planned frames."""
        source, metadata = self.clip.source, self.metadata
        if source.timestamps is not None:
            return [float(source.second(index)) for index in self.plan.frame_indices]
        return [index / metadata.fps for index in metadata.frames_indices]

    def frames(self, batch: int) -> Iterator[torch.Tensor]:
        """The planned frames, resized, (n, 3, H, W) uint8, `batch` at a time."""
        return self.clip.stream(self.plan, self._resize, batch)

    def unread(self) -> "UnreadFrames":
        """What stands for the frames in calls that look at shapes."""
        shape = len(self.plan.frame_indices), 3, self.plan.height, self.plan.width
        frames = torch.empty(1, dtype=torch.uint8).expand(shape).as_subclass(UnreadFrames)
        frames.stream = self
        return frames


class UnreadFrames(torch.Tensor):
    """The shape of frames, without memory for them."""

    stream: VideoStream
