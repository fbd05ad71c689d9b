"""Without torchvision, the pixels of videos are those that transformers computes with it, to the last bit."""

import itertools

import pytest
import torch
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from pixels_videonsa import PlainVideoProcessor

SETTINGS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "rescale_factor": 1 / 127}
CALL = {
    "do_resize": False,
    "do_sample_frames": False,
    "return_tensors": "pt",
    "return_metadata": False,
    "input_data_format": "channels_first",
}


def build(**settings):
    settings = {"cap_pixels_per_frame": False} | settings
    return PlainVideoProcessor(**settings), Qwen2VLVideoProcessor(**settings)


def noise(shape, dtype):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["defaults", "others"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_patches(dtype, settings):
    ours, theirs = build(**settings)
    videos = [noise((count, 3, 56, 84), dtype) for count in (1, 2, 5)] + [noise((4, 3, 28, 28), dtype)]
    for rescale, normalize in itertools.product((True, False), repeat=2):
        options = CALL | {"do_rescale": rescale, "do_normalize": normalize}
        for given in (videos[:1], videos):
            mine, other = ours(given, **options), theirs(given, **options)
            for name in ("pixel_values_videos", "video_grid_thw"):
                assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name])


@pytest.mark.parametrize("resample", [None, 0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64], ids=str)
def test_resizing(dtype, resample):
    ours, theirs = build()
    for count, channels, height, width in ((1, 3, 113, 77), (3, 3, 30, 31), (2, 1, 240, 320)):
        for frames in (
            noise((count, channels, height, width), dtype),
            noise((count, height, width, channels), dtype).permute(0, 3, 1, 2),
        ):
            size = SizeDict(height=56, width=84)
            expected = BaseVideoProcessor.resize(theirs, frames, size=size, resample=resample)
            resized = ours.resize_frames(frames, 56, 84, resample)
            assert resized.dtype == expected.dtype and torch.equal(resized, expected)


def test_it_is_saved_as_transformers_own(tmp_path):
    ours, theirs = build(**SETTINGS)
    ours.save_pretrained(tmp_path)
    assert Qwen2VLVideoProcessor.from_pretrained(tmp_path).to_dict() == theirs.to_dict()
    assert PlainVideoProcessor.from_pretrained(tmp_path).to_dict() == ours.to_dict()


def test_what_it_cannot_do():
    ours, _ = build()
    with pytest.raises(ValueError, match="`do_resize`=True needs torchvision"):
        ours([noise((2, 3, 50, 50), torch.uint8)])
    with pytest.raises(ValueError, match="`resample`=1 needs torchvision"):
        ours.resize_frames(noise((2, 3, 50, 50), torch.uint8), 28, 28, 1)
