"""The pixels of videos where torchvision is not installed, which transformers' own video processors need.

`PlainVideoProcessor` computes what `Qwen2VLVideoProcessor` does, to the last bit, for the one use that
`VideoNSAProcessor` makes of it: frames that are resized become patches. Where torchvision is there, it is not used.
"""

import torch
from PIL.Image import Resampling
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin

_INTERPOLATIONS = {
    Resampling.NEAREST: "nearest-exact",
    Resampling.BILINEAR: "bilinear",
    Resampling.BICUBIC: "bicubic",
}


class PlainVideoProcessorKwargs(VideosKwargs, total=False):
    """Settings of `Qwen2VLVideoProcessor`."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


class PlainVideoProcessor(VideoProcessorMixin):
    """`Qwen2VLVideoProcessor` without torchvision, for frames that need no resizing; saved under that name."""

    resample = Resampling.BICUBIC
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    do_sample_frames = False
    patch_size = 14
    temporal_patch_size = 2
    merge_size = 2
    cap_pixels_per_frame = False
    valid_kwargs = PlainVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, **kwargs):
        # Attributes that a checkpoint does not set keep the defaults of the class.
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})

    def to_dict(self) -> dict:
        return super().to_dict() | {"video_processor_type": "Qwen2VLVideoProcessor"}

    def preprocess(self, videos: list[torch.Tensor], **kwargs) -> BatchFeature:
        """Patches of videos.

        Args:
            videos: tensors (T, 3, H, W), whose sides are multiples of `patch_size * merge_size`.
            kwargs: `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean`, `image_std`, `device`; of others, the
                class has the only value, or they say nothing about tensors of this kind.
        Returns:
            `pixel_values_videos` (patches, 3 * temporal_patch_size * patch_size**2), float32 if it is rescaled or
            normalised; `video_grid_thw` (videos, 3).
        Raises:
            ValueError: frames that would have to be resized.
        """
        settings = {name: kwargs.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        if settings["do_resize"]:
            raise ValueError("`do_resize`=True needs torchvision: pip install torchvision")
        patches, grids = [], []
        for video in videos:
            video = video if settings["device"] is None else video.to(settings["device"])
            rows, grid = self._cut(self._normalize(video, settings))
            patches.append(rows)
            grids.append(grid)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))

    @staticmethod
    def _normalize(video: torch.Tensor, settings: dict) -> torch.Tensor:
        factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
        if not settings["do_normalize"]:
            return video * factor if settings["do_rescale"] else video
        # Rescaling is folded into mean and deviation, as transformers does, so that the roundings are the same.
        mean, std = (
            (torch.tensor(settings[name]) * (1.0 / factor)).to(video.device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        return (video.float() - mean) / std

    def _cut(self, video: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Patches in the order of the model's merger: windows of `merge_size**2` patches stay together."""
        missing = -len(video) % self.temporal_patch_size
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        merged = self.patch_size * self.merge_size
        blocks = video.unfold(0, self.temporal_patch_size, self.temporal_patch_size)  # (t, C, H, W, dt)
        blocks = blocks.unfold(2, merged, merged).unfold(3, merged, merged)  # (t, C, h, w, dt, merged, merged)
        blocks = blocks.unflatten(6, (self.merge_size, self.patch_size)).unflatten(
            5, (self.merge_size, self.patch_size)
        )
        t, channels, h, w = blocks.shape[:4]
        rows = blocks.permute(0, 2, 3, 5, 7, 1, 4, 6, 8).reshape(
            t * h * w * self.merge_size**2, channels * self.temporal_patch_size * self.patch_size**2
        )
        return rows, [t, h * self.merge_size, w * self.merge_size]

    def resize_frames(self, frames: torch.Tensor, height: int, width: int, resample: int | None) -> torch.Tensor:
        """(T, C, H, W) frames to (T, C, height, width), with antialiasing, of the same dtype.

        Raises:
            ValueError: another `resample` than nearest, bilinear and bicubic.
        """
        resample = Resampling.BILINEAR if resample is None else resample
        if resample not in _INTERPOLATIONS:
            raise ValueError(f"`resample`={resample!r} needs torchvision: pip install torchvision")
        mode = _INTERPOLATIONS[resample]
        smooth = {} if resample == Resampling.NEAREST else {"align_corners": False, "antialias": True}
        if frames.is_floating_point() or frames.dtype == torch.uint8:
            return torch.nn.functional.interpolate(frames, (height, width), mode=mode, **smooth)
        info = torch.iinfo(frames.dtype)
        resized = torch.nn.functional.interpolate(frames.float(), (height, width), mode=mode, **smooth)
        return resized.round().clamp(info.min, info.max).to(frames.dtype)
