"""Video files on their way to the processor: as they are.

vLLM decodes a video when it arrives, 32 frames of it unless told otherwise, before the other videos of the prompt and
the request's options are known. Ours chooses frames and sizes with all of that (`processing.py`), so that nothing is
decoded here: the "frames" are the bytes of the file.
"""

from typing import Any

import numpy as np

from .internals import VIDEO_LOADER_REGISTRY, VideoLoader

NAME = "videonsa"
FILE_MARK = "videonsa_file"
# What vLLM passes where nobody asked for a number.
_VLLMS_DEFAULT_FRAMES = 32


class VideoNSALoader(VideoLoader):
    """Hands files over undecoded."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = _VLLMS_DEFAULT_FRAMES, **kwargs: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The bytes of a file as an array (bytes,) of uint8, and metadata that say so.

        Raises:
            ValueError: an option of vLLM's own loaders.
        """
        given = kwargs | ({} if num_frames == _VLLMS_DEFAULT_FRAMES else {"num_frames": num_frames})
        if given:
            raise ValueError(
                f"`media_io_kwargs` has {', '.join(map(repr, given))} for videos: with VideoNSA, options of videos go "
                "into `mm_processor_kwargs`"
            )
        return np.frombuffer(data, np.uint8), {FILE_MARK: True}


def register_loader() -> None:
    """Make the loader known to vLLM under `NAME`; `settings.py` chooses it for our models alone."""
    VIDEO_LOADER_REGISTRY.register(NAME)(VideoNSALoader)
