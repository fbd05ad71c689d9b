"""Options of a call and of the parts of a processor: numbers of every kind, and none ignored in silence."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from processor_testing import ROOT, apply, build_processor, message, numbered, numbered_video
from tiny_random import save_tiny_qwen2_5_vl, tiny_tokenizer
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from budget_videonsa import VideoOptions, VideoSource
from processing_videonsa import VideoNSAProcessor

VIDEO, IMAGE = "<|video_pad|>", "<|image_pad|>"
IMAGE_SIZE = {"min_pixels": 56 * 56, "max_pixels": 50176}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(numbered_video(tmp_path_factory.mktemp("videos") / "a.mp4"))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr("processing_videonsa.logger.warning_once", said.append)
    return said


# Numbers


@pytest.mark.parametrize(
    "five",
    [
        np.float32(5),
        np.float16(5),
        np.int8(5),
        np.array(5.0),
        torch.tensor(5.0),
        torch.tensor(5),
        Fraction(5),
        Decimal(5),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_rates_of_every_kind(processor, path, five):
    part = {"type": "video", "video": path}
    assert apply(processor, message(part), fps=five)["video_grid_thw"].tolist() == [[5, 4, 16]]
    assert apply(processor, message(part | {"fps": five}))["video_grid_thw"].tolist() == [[5, 4, 16]]
    assert processor(text=VIDEO, videos=path, fps=[five], return_tensors="pt")["video_grid_thw"].tolist() == [
        [5, 4, 16]
    ]
    assert type(build_processor(fps=five).fps) in (int, float)  # as JSON has them


@pytest.mark.parametrize(
    "eight", [np.int64(8), np.uint8(8), np.array(8), torch.tensor(8)], ids=lambda v: type(v).__name__
)
def test_counts_of_every_kind(processor, path, eight):
    part = {"type": "video", "video": path}
    assert apply(processor, message(part), num_frames=eight)["video_grid_thw"].tolist() == [[4, 4, 16]]
    assert apply(processor, message(part | {"nframes": eight}))["video_grid_thw"].tolist() == [[4, 4, 16]]
    assert build_processor(num_frames=eight).to_dict()["num_frames"] == 8


def test_limits_of_every_kind(processor, path):
    limits = {"max_total_tokens": np.int32(40), "max_pixels_per_frame": torch.tensor(6272), "max_frames": np.uint8(8)}
    plan = processor.plan_video(path, fps=25, **limits)
    assert (plan.num_frames, plan.height, plan.width, plan.tokens) == (8, 28, 140, 20)


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), "2", np.float32("nan"), Decimal("inf"), [1, 2]], ids=repr
)
def test_what_is_no_number_is_named(processor, path, value):
    for name in ("fps", "num_frames", "max_total_tokens"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            processor(text=VIDEO, videos=path, **{name: value})
    with pytest.raises(ValueError, match=r"`num_frames` must be a positive integer, got .*8\.0"):
        processor(text=VIDEO, videos=path, num_frames=np.float32(8))


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="`num_frames`=8 exceeds `max_frames`=4"):
        VideoOptions(num_frames=8, max_frames=4)
    assert VideoOptions(num_frames=8).over(VideoOptions(max_frames=4)) == VideoOptions(num_frames=8)
    assert VideoOptions(max_frames=5).over(VideoOptions(num_frames=8)) == VideoOptions(num_frames=4, max_frames=5)
    processor = build_processor(num_frames=16)
    plan = processor.plan_video(VideoSource(100, 25.0, 56, 56), max_frames=7)
    assert plan.num_frames == 6


# Options in every place


def test_options_in_common_kwargs(processor, path):
    expected = processor(text=VIDEO, videos=path, fps=5, return_tensors="pt")
    inputs = processor(text=VIDEO, videos=path, common_kwargs={"fps": 5, "return_tensors": "pt"})
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"fps": 2, "common_kwargs": {"fps": 2}}, "`fps` was given twice: as a keyword and in `common_kwargs`"),
        ({"common_kwargs": {"fsp": 2}}, "`fsp` is not an option .*`fps`"),
        ({"text_kwargs": {"fps": 2}}, "`fps` in `text_kwargs` is not an option"),
        ({"audio_kwargs": {"sampling_rate": 1}}, "`sampling_rate` in `audio_kwargs`"),
        ({"max_pixels": 784, "images_kwargs": {"max_pixels": 3136}}, "`max_pixels` was given twice"),
        ({"max_pixels": 784, "videos_kwargs": {"max_pixels": 3136}}, "`max_pixels` was given twice"),
        ({"max_pixels": 784, "size": {"longest_edge": 3136}}, "`max_pixels`=784 contradicts `size`"),
        ({"do_convert_rgb": False}, "`do_convert_rgb` cannot be set in a call: the model takes RGB"),
        ({"do_center_crop": True}, "`do_center_crop` cannot be set"),
        ({"default_to_square": True}, "`default_to_square` cannot be set"),
        ({"images_kwargs": {"do_pad": True}}, "`do_pad` cannot be set"),
        ({"images_kwargs": {"patch_size": 16}}, "`patch_size` cannot be set"),
        ({"do_sample_frames": "no"}, "`do_sample_frames` must be True, False or None, got 'no'"),
        ({"do_sample_frames": 0}, "`do_sample_frames` must be .* got 0"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_named(processor, path, options, match):
    with pytest.raises(ValueError, match=match):
        processor(text=VIDEO + IMAGE, videos=path, images=Image.new("RGB", (56, 56)), **options)


def test_options_twice_in_a_conversation(processor, path):
    with pytest.raises(ValueError, match="`fps` was given twice: as a keyword and in `processor_kwargs`"):
        apply(processor, message({"type": "video", "video": path}), fps=2, processor_kwargs={"fps": 2})


def test_sizes_of_images_and_videos_are_set_together_or_apart(processor, path):
    def grids(**options):
        inputs = processor(text=IMAGE + VIDEO, images=image, videos=path, num_frames=2, return_tensors="pt", **options)
        return inputs["image_grid_thw"].tolist() + inputs["video_grid_thw"].tolist()

    image = Image.new("RGB", (112, 112))
    assert grids() == [[1, 8, 8], [1, 4, 16]]
    assert grids(max_pixels=3136) == [[1, 4, 4], [1, 2, 8]]
    assert grids(max_pixels=3136, max_pixels_per_frame=50176) == [[1, 4, 4], [1, 4, 16]]
    assert grids(images_kwargs={"max_pixels": 3136}) == [[1, 4, 4], [1, 4, 16]]
    assert grids(images_kwargs={"size": {"shortest_edge": 784, "longest_edge": 784}}) == [[1, 2, 2], [1, 4, 16]]
    assert grids(videos_kwargs={"max_pixels": 3136}) == [[1, 8, 8], [1, 2, 8]]
    # A default minimum gives way to a lower maximum, for an image that is smaller still too.
    image = Image.new("RGB", (28, 28))
    assert grids(max_pixels=784)[0] == [1, 2, 2]


# Frames that are sampled, or not


SAMPLED = {"total_num_frames": 200, "fps": 10.0, "frames_indices": list(range(0, 200, 10))}


@pytest.mark.parametrize(
    "options, indices",
    [
        ({"video_metadata": SAMPLED}, range(0, 200, 10)),
        (
            {"video_metadata": SAMPLED | {"fps": 40.0}, "do_sample_frames": True},
            [0, 20, 40, 60, 80, 110, 130, 150, 170, 190],
        ),
        ({"video_metadata": SAMPLED, "do_sample_frames": True, "fps": 0.2}, [0, 60, 130, 190]),
        ({"video_metadata": SAMPLED, "do_sample_frames": True, "num_frames": 4}, [0, 60, 130, 190]),
        ({"video_metadata": {"total_num_frames": np.int64(20), "fps": np.float32(10)}}, [0, 6, 13, 19]),
        ({"do_sample_frames": True, "num_frames": 4}, [0, 6, 13, 19]),
        ({"fps": 4, "max_frames": 5}, [0, 6, 13, 19]),
        ({"fps": 4, "max_frames": 20}, range(20)),
        ({"do_sample_frames": np.False_}, range(20)),
    ],
    ids=str,
)
def test_sampling_of_frames(processor, options, indices):
    frames = np.stack([numbered(i) for i in range(20)])
    inputs = processor(text=VIDEO, videos=frames, return_metadata=True, return_tensors="pt", **options)
    assert inputs["video_metadata"][0].frames_indices == list(indices)
    assert inputs["video_grid_thw"].tolist() == [[len(indices) // 2, 4, 16]]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"do_sample_frames": True}, "`do_sample_frames`=True needs `num_frames`, or the timing"),
        ({"do_sample_frames": True, "fps": 2}, "`do_sample_frames`=True needs `num_frames`, or the timing"),
        ({"do_sample_frames": False, "max_frames": 4}, "`max_frames`=4 contradicts `do_sample_frames`=False"),
        ({"video_metadata": {"total_num_frames": 20, "fps": -1}}, "`fps` of `video_metadata` .* -1"),
        ({"video_metadata": {"total_num_frames": 20, "fps": True}}, "`fps` of `video_metadata` .* True"),
        ({"video_metadata": SAMPLED | {"total_num_frames": None}}, "needs `total_num_frames`"),
    ],
    ids=str,
)
def test_sampling_that_is_refused(processor, options, match):
    frames = np.stack([numbered(i) for i in range(20)])
    with pytest.raises(ValueError, match=match):
        processor(text=VIDEO, videos=frames, **options)


def test_a_rate_in_a_conversation_is_no_call_for_sampling(processor, path):
    """transformers says `do_sample_frames=True` wherever a rate is given; of frames it is the rate they have."""
    frames = [Image.fromarray(numbered(i)) for i in range(8)]
    inputs = apply(processor, message({"type": "video", "video": frames}, {"type": "video", "video": path}), fps=5)
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 16], [5, 4, 16]]
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([0.4, 0.4])
    with pytest.raises(ValueError, match="`do_sample_frames`=True needs"):
        apply(processor, message({"type": "video", "video": frames}), fps=5, do_sample_frames=True)


# What a video processor brings


def with_video_processor(video_processor, **options) -> VideoNSAProcessor:
    template = (ROOT / "chat_template.jinja").read_text()
    image_processor = Qwen2VLImageProcessor(**IMAGE_SIZE)
    return VideoNSAProcessor(image_processor, tiny_tokenizer(), video_processor, chat_template=template, **options)


@pytest.mark.parametrize(
    "brought, options, expected",
    [
        ({}, {}, (2.0, None, None, 3136, 50176)),
        ({"max_pixels": 100352}, {}, (2.0, None, None, 3136, 100352)),
        ({"size": {"shortest_edge": 784, "longest_edge": 6272}}, {}, (2.0, None, None, 784, 6272)),
        ({"max_pixels": 100352}, {"max_pixels_per_frame": 100352}, (2.0, None, None, 3136, 100352)),
        ({"max_pixels": 100352}, {"min_pixels_per_frame": 6272}, (2.0, None, None, 6272, 100352)),
        ({"fps": 4, "max_frames": 16}, {}, (4, None, 16, 3136, 50176)),
        ({"num_frames": 8}, {}, (None, 8, None, 3136, 50176)),
    ],
    ids=str,
)
def test_a_video_processor_keeps_what_it_brings(path, brought, options, expected):
    processor = with_video_processor(Qwen2VLVideoProcessor(**brought), **options)
    names = ("fps", "num_frames", "max_frames", "min_pixels_per_frame", "max_pixels_per_frame")
    assert tuple(getattr(processor, name) for name in names) == expected
    assert dict(processor.video_processor.size) == {"shortest_edge": expected[3], "longest_edge": expected[4]}
    assert dict(processor.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 50176}
    plan = processor.plan_video(path)
    big = processor(text=VIDEO, videos=np.zeros((2, 560, 560, 3), np.uint8), fps=2, return_tensors="pt")
    assert plan.num_frames == (expected[1] or min(2 * expected[0], expected[2] or 100))
    size = smart_resize(560, 560, 28, expected[3], expected[4])
    assert big["video_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]


@pytest.mark.parametrize(
    "brought, options, match",
    [
        ({"max_pixels": 100352}, {"max_pixels_per_frame": 50176}, "`max_pixels_per_frame`=50176 contradicts .* 100352"),
        ({"fps": 4}, {"fps": 2}, "`fps`=2 contradicts `video_processor`, which has 4"),
        ({"num_frames": 8}, {"fps": 2}, "exclude each other, got fps=2 and num_frames=8"),
        ({"max_pixels": 784}, {}, r"`min_pixels_per_frame` \(3136\) must not exceed"),
        ({"min_frames": 8}, {}, "`video_processor` has min_frames=8"),
        ({"cap_pixels_per_frame": True}, {}, "`video_processor` has cap_pixels_per_frame=True"),
        ({"max_video_tokens": 5}, {}, "`video_processor` has max_video_tokens=5"),
    ],
    ids=str,
)
def test_a_video_processor_that_contradicts(brought, options, match):
    with pytest.raises(ValueError, match=match):
        with_video_processor(Qwen2VLVideoProcessor(**brought), **options)


def test_saved_options_count(tmp_path, warnings):
    processor = with_video_processor(Qwen2VLVideoProcessor(max_pixels=100352, fps=4))
    processor.save_pretrained(tmp_path)
    loaded = VideoNSAProcessor.from_pretrained(tmp_path)
    assert (loaded.fps, loaded.max_pixels_per_frame) == (4, 100352)
    loaded = VideoNSAProcessor.from_pretrained(tmp_path, num_frames=8, max_pixels_per_frame=6272)
    assert (loaded.fps, loaded.num_frames, loaded.max_pixels_per_frame) == (None, 8, 6272)
    assert loaded.video_processor.size["longest_edge"] == 6272
    processor.fps, processor.max_pixels_per_frame = 1, 50176
    processor.save_pretrained(tmp_path)
    loaded = VideoNSAProcessor.from_pretrained(tmp_path)
    assert (loaded.fps, loaded.max_pixels_per_frame) == (1, 50176) and warnings == []


def test_sizes_in_a_folder_of_qwen_are_not_taken_over_in_silence(tmp_path, warnings):
    save_tiny_qwen2_5_vl(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    stored["video_processor"]["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    loaded = VideoNSAProcessor.from_pretrained(tmp_path)
    assert loaded.max_pixels_per_frame == 50176
    assert len(warnings) == 1 and "'max_pixels_per_frame': 12845056} is not used" in warnings[0]
