"""The processor: what it asks of a video, what it reads, and that tokens and timing are Qwen2.5-VL's."""

import json
import logging
import math
import shutil

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moving_shapes import draw_frame
from PIL import Image
from processor_testing import ROOT, apply, build_processor, message, numbered, numbered_video, numbers
from qwen_vl_utils import process_vision_info, vision_process
from tiny_random import save_tiny_qwen2_5_vl, tiny_tokenizer
from transformers import (
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from budget_videonsa import PatchSizes, VideoOptions, VideoSource, plan_videos
from processing_videonsa import VideoNSAProcessor
from synthetic.drawing import write_video

KEYS = {
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def prompt(processor, messages) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def assert_same(one, other, *, pixels: str = "equal"):
    """Equal keys and tensors. Video pixels are "equal", "rounded" (all but one in a thousand differ by one level of 255
    at most: an interpolation that rounds between its two passes, and one that does not) or not compared ("any")."""
    assert set(one) == set(other)
    for key in one:
        if key != "pixel_values_videos" or pixels == "equal":
            assert torch.equal(one[key], other[key]), key
        elif pixels == "rounded":
            one_level = 1.001 / 255 / min(Qwen2VLVideoProcessor.image_std)
            assert ((one[key] - other[key]).abs() > one_level).float().mean() < 1e-3


# Chat template: the sequences are those of the template published with Qwen2.5-VL.

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    "messages, options, expected",
    [
        ([{"role": "user", "content": "Hi\n"}], {}, SYSTEM + "<|im_start|>user\nHi\n<|im_end|>\n"),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            {"add_generation_prompt": True},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            message({"type": "video", "video": "a.mp4"}, {"type": "image", "image": "a.png"}, {"image_url": "b.png"}),
            {},
            SYSTEM + f"<|im_start|>user\n{VIDEO}{IMAGE}{IMAGE}What happens?<|im_end|>\n",
        ),
        (
            [
                *message({"type": "video"}, {"type": "image"}, {"video": "b.mp4"}, text="?"),
                {"role": "assistant", "content": [{"type": "text", "text": "Much."}]},
            ],
            {"add_vision_id": True},
            SYSTEM + f"<|im_start|>user\nVideo 1: {VIDEO}Picture 1: {IMAGE}Video 2: {VIDEO}?<|im_end|>\n"
            "<|im_start|>assistant\nMuch.<|im_end|>\n",
        ),
    ],
    ids=["default system", "own system", "vision", "vision ids"],
)
def test_chat_template(processor, messages, options, expected):
    assert processor.apply_chat_template(messages, tokenize=False, **options) == expected


# The plan


def test_default_budget_is_64_tokens_per_two_frames(processor):
    plan = processor.plan_video(VideoSource(600, 30.0, 1080, 1080))
    assert (plan.num_frames, plan.height, plan.width, plan.tokens) == (40, 224, 224, 20 * 64)
    assert plan.fps == 2.0 and plan.notes == ()
    assert (plan.frame_indices[0], plan.frame_indices[-1]) == (0, 599)


def test_small_frames_are_not_enlarged_beyond_the_minimum(processor):
    plan = processor.plan_video(VideoSource(100, 10.0, 56, 56))
    assert (plan.height, plan.width) == (56, 56)
    plan = processor.plan_video(VideoSource(100, 10.0, 20, 20))
    assert (plan.height, plan.width) == (56, 56)
    plan = processor.plan_video(VideoSource(100, 10.0, 56, 56), min_pixels_per_frame=112 * 112)
    assert (plan.height, plan.width) == (112, 112)


def test_resolution_gives_way_before_frames(processor):
    hour = VideoSource(3600 * 30, 30.0, 720, 720, name="hour.mp4")
    plan = processor.plan_video(hour)
    # 3600 pairs of frames at 64 tokens are 230400: 36 tokens fit, and all frames stay.
    assert (plan.num_frames, plan.height, plan.width, plan.tokens) == (7200, 168, 168, 3600 * 36)
    assert plan.requested_tokens == 3600 * 64 and len(plan.notes) == 1 and "224x224 to 168x168" in plan.notes[0]
    assert plan.fps == 2.0

    plan = processor.plan_video(hour, max_total_tokens=16000)
    # At the floor of 16 tokens for two frames, 1000 pairs fit; the timing follows.
    assert (plan.num_frames, plan.height, plan.width, plan.tokens) == (2000, 112, 112, 16000)
    assert plan.fps == pytest.approx(2000 / 3600) and "2000 of 7200 frames" in plan.notes[1]
    steps = np.diff(plan.frame_indices)
    assert plan.frame_indices[0] == 0 and plan.frame_indices[-1] == hour.num_frames - 1
    assert steps.max() - steps.min() <= 1


def test_budget_is_shared_by_the_videos_of_a_prompt(processor):
    long, short = VideoSource(2400, 30.0, 448, 448, name="long"), VideoSource(600, 30.0, 448, 224, name="short")
    alone = [processor.plan_video(source, max_total_tokens=4000) for source in (long, short)]
    together = processor.plan_videos([long, short], max_total_tokens=4000)
    assert sum(plan.tokens for plan in together) <= 4000 < sum(plan.tokens for plan in alone)
    few = processor.plan_videos([long, short], max_total_tokens=400)
    assert sum(plan.tokens for plan in few) <= 400
    shares = [plan.num_frames / plan.requested_frames for plan in few]
    assert shares[0] == pytest.approx(shares[1], abs=0.05) and shares[0] < 1


def test_too_small_a_budget_is_an_error(processor):
    source = VideoSource(100, 25.0, 224, 224, name="a.mp4")
    with pytest.raises(ValueError, match=r"max_total_tokens`=15 .*a\.mp4 \(8 frames\).*16 tokens"):
        processor.plan_video(source, max_total_tokens=15)
    with pytest.raises(ValueError, match="max_total_tokens"):
        processor.plan_video(
            VideoSource(100, 25.0, 224, 224, may_drop_frames=False, presampled=True), max_total_tokens=799
        )
    with pytest.raises(ValueError, match=r"wide\.mp4.*aspect ratio"):
        processor.plan_video(VideoSource(100, 25.0, 2, 1000, name="wide.mp4"))


@st.composite
def sources(draw):
    return VideoSource(
        num_frames=draw(st.integers(1, 20000)),
        fps=draw(st.sampled_from([1.0, 15.0, 24000 / 1001, 25.0, 60.0])),
        height=draw(st.integers(16, 1080)),
        width=draw(st.integers(16, 1080)),
        presampled=draw(st.booleans()),
    )


@given(
    st.lists(sources(), min_size=1, max_size=4),
    st.sampled_from([0.5, 2.0, 4.0, 100.0]),
    st.integers(3136, 200_000),
    st.integers(64, 200_000),
)
@settings(max_examples=150, deadline=None)
def test_plans_keep_their_promises(videos, fps, pixels, budget):
    options = [VideoOptions(fps=fps, min_pixels_per_frame=3136, max_pixels_per_frame=pixels)] * len(videos)
    try:
        plans = plan_videos(videos, options, budget)
    except ValueError as error:
        assert "too small" in str(error)
        least = [plan_videos([video], options[:1], 10**9)[0] for video in videos]
        assert sum(plan.requested_tokens for plan in least) > budget
        return
    assert sum(plan.tokens for plan in plans) <= budget
    for plan, video in zip(plans, videos, strict=True):
        assert plan.height % 28 == plan.width % 28 == 0
        assert plan.tokens == math.ceil(plan.num_frames / 2) * (plan.height // 28) * (plan.width // 28)
        assert len(plan.frame_indices) == plan.num_frames
        assert all(0 <= i < video.num_frames for i in plan.frame_indices)
        assert list(plan.frame_indices) == sorted(plan.frame_indices)
        assert plan.num_frames % 2 == 0 or plan.num_frames == video.num_frames
        reduced = plan.tokens < plan.requested_tokens
        assert reduced == bool(plan.notes)
    if any(plan.num_frames < plan.requested_frames for plan in plans):
        # Frames are left out only when every video is as small as it may be.
        for plan, video in zip(plans, videos, strict=True):
            floors = [smart_resize(video.height, video.width, 28, 3136, max(3136, p)) for p in (pixels, pixels // 4)]
            assert (plan.height, plan.width) == min(floors, key=math.prod)


@given(
    st.integers(4, 20000),
    st.sampled_from([10.0, 24000 / 1001, 25.0, 30.0]),
    st.sampled_from([0.5, 1.0, 2.0, 4.0, 30.0]),
    st.integers(56, 1080),
    st.integers(56, 1080),
    st.integers(3136, 602112),
)
@settings(max_examples=200, deadline=None)
def test_frames_and_sizes_are_those_of_qwen_vl_utils(total, rate, fps, height, width, pixels):
    options = VideoOptions(fps=fps, max_frames=768, min_pixels_per_frame=3136, max_pixels_per_frame=pixels)
    plan = plan_videos([VideoSource(total, rate, height, width)], [options], 10**9)[0]
    count = vision_process.smart_nframes({"fps": fps}, total_frames=total, video_fps=rate)
    assert plan.num_frames == count
    assert plan.frame_indices == tuple(torch.linspace(0, total - 1, count).round().long().tolist())
    assert plan.fps == pytest.approx(count / total * rate, rel=1e-12)
    size = vision_process.smart_resize(height, width, 28, 3136, pixels)
    # Of narrow frames it leaves nothing; transformers' version of the function, used here, keeps one patch.
    assert (plan.height, plan.width) == tuple(max(28, side) for side in size)


def test_num_frames(processor):
    source = VideoSource(100, 25.0, 224, 224)
    assert processor.plan_video(source, num_frames=10).num_frames == 10
    assert processor.plan_video(source, num_frames=11).num_frames == 12  # round(5.5) * 2, as in qwen-vl-utils
    assert processor.plan_video(source, num_frames=10).fps == 2.5
    plan = processor.plan_video(source, num_frames=200)
    assert plan.num_frames == 100 and "num_frames=200" in plan.notes[0]
    assert processor.plan_video(source, fps=25, max_frames=20).num_frames == 20


def test_other_patch_sizes():
    option = VideoOptions(fps=2.0, min_pixels_per_frame=1024, max_pixels_per_frame=256 * 256)
    plan = plan_videos([VideoSource(80, 20.0, 256, 256)], [option], 10**6, PatchSizes(temporal=4, spatial=32))[0]
    assert (plan.num_frames, plan.tokens) == (8, 2 * 64)


# Calls


def test_a_call_follows_its_plan(processor, tmp_path):
    path = numbered_video(tmp_path / "a.mp4")
    plan = processor.plan_video(path, fps=5)
    inputs = apply(processor, message({"type": "video", "video": str(path)}), fps=5)
    assert set(inputs) == KEYS
    assert (inputs["input_ids"] == processor.video_token_id).sum() == plan.tokens == 5 * 2 * 8
    assert inputs["video_grid_thw"].tolist() == [[5, 4, 16]]
    assert inputs["pixel_values_videos"].shape == (5 * 4 * 16, 1176)
    assert inputs["second_per_grid_ts"].dtype == torch.float32
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([0.4])
    assert torch.equal(inputs["mm_token_type_ids"] == 2, inputs["input_ids"] == processor.video_token_id)
    direct = processor(text=prompt(processor, message({"type": "video"})), videos=path, fps=5, return_tensors="pt")
    assert_same(inputs, direct)


def test_pixels_are_those_of_the_video_processor(processor, tmp_path):
    """Resizing frame by frame while decoding gives what the stock video processor gives for whole arrays."""
    pictures = [draw_frame(i / 2, 2, 320, 240) for i in range(6)]
    path = write_video(tmp_path / "a.mkv", pictures, 2, codec="ffv1")
    stock = Qwen2VLVideoProcessor(min_pixels=3136, max_pixels=50176, cap_pixels_per_frame=False)
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    expected = stock(frames, return_tensors="pt")["pixel_values_videos"]
    inputs = apply(processor, message({"type": "video", "video": path}), do_sample_frames=False)
    assert torch.equal(inputs["pixel_values_videos"], expected)
    assert torch.equal(apply(processor, message({"type": "video", "video": frames}))["pixel_values_videos"], expected)


def test_long_videos_are_patched_in_parts_without_a_seam(processor):
    frames = torch.randint(0, 256, (131, 3, 28, 56), dtype=torch.uint8)
    stock = Qwen2VLVideoProcessor(min_pixels=784, max_pixels=50176, cap_pixels_per_frame=False)
    expected = stock([frames, frames[:3]], return_tensors="pt")
    inputs = processor(text=VIDEO + VIDEO, videos=[frames, frames[:3]], min_pixels_per_frame=784, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(inputs["video_grid_thw"], expected["video_grid_thw"])
    assert inputs["video_grid_thw"].tolist() == [[66, 2, 4], [2, 2, 4]]


def test_generate_accepts_the_inputs(processor, tmp_path):
    folder = save_tiny_qwen2_5_vl(tmp_path / "model")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    path = numbered_video(tmp_path / "a.mp4")
    image = Image.fromarray(numbered(3))
    messages = [
        message({"type": "image", "image": image}, {"type": "video", "video": path}, {"type": "video", "video": path}),
        message({"type": "video", "video": path, "num_frames": 4}, text="A longer question about it?"),
    ]
    inputs = apply(processor, messages, padding=True)
    assert set(inputs) == KEYS | {"pixel_values", "image_grid_thw"}
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=[])
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_batches_are_padded_left_and_equal_their_samples(processor, tmp_path):
    path = numbered_video(tmp_path / "a.mp4")
    samples = [
        message({"type": "video", "video": path}, text="Short?"),
        message({"type": "text", "text": "No video here"}),
        message({"type": "video", "video": path, "fps": 5}, {"type": "video", "video": path, "num_frames": 2}),
    ]
    batch = apply(processor, samples, padding=True)
    singles = [apply(processor, sample) for sample in samples]
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        for key in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(batch[key][row, -length:], single[key][0])
        assert batch["attention_mask"][row].sum() == length
        assert batch["attention_mask"][row, -length:].all()
    for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        assert torch.equal(batch[key], torch.cat([single[key] for single in singles if key in single]))


def test_budget_is_per_prompt(processor, tmp_path):
    path = numbered_video(tmp_path / "a.mp4")
    video = {"type": "video", "video": path}
    inputs = apply(processor, [message(video), message(video, video)], padding=True, max_total_tokens=32)
    tokens = (inputs["input_ids"] == processor.video_token_id).sum(1).tolist()
    assert tokens == [32, 32]
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 16], [1, 4, 16], [1, 4, 16]]
    assert inputs["second_per_grid_ts"].tolist() == [1.0, 2.0, 2.0]


def test_what_was_chosen_is_said(processor, tmp_path, caplog, monkeypatch):
    path = numbered_video(tmp_path / "said.mp4")
    monkeypatch.setattr(logging.getLogger("processing_videonsa"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="processing_videonsa"):
        apply(processor, message({"type": "video", "video": path}))
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert "said.mp4: 4 frames at 2 per second, 56x224 pixels, 32 tokens" in caplog.text
        caplog.clear()
        for _ in range(2):
            inputs = apply(
                processor, message({"type": "video", "video": path}), max_total_tokens=16, return_metadata=True
            )
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "2 of 4 frames kept to keep the prompt within max_total_tokens=16" in caplog.text
    assert inputs["video_plans"][0].notes and inputs["video_plans"][0].tokens == 16
    assert inputs["video_metadata"][0].frames_indices == [0, 49]


def test_messages_are_left_as_they_are(processor, tmp_path):
    messages = message({"type": "video", "video": numbered_video(tmp_path / "a.mp4"), "fps": 4})
    before = repr(messages)
    apply(processor, messages)
    assert repr(messages) == before


# Options


def test_options_of_call_message_and_config(tmp_path):
    path = numbered_video(tmp_path / "a.mp4")
    processor = build_processor(fps=5, max_pixels_per_frame=28 * 28 * 6)
    video = {"type": "video", "video": path}

    def grid(*args, **kwargs):
        return apply(processor, *args, **kwargs)["video_grid_thw"].tolist()

    assert grid(message(video)) == [[5, 2, 8]]
    assert grid(message(video), fps=2, max_pixels_per_frame=50176) == [[2, 4, 16]]
    assert grid(message(video), processor_kwargs={"num_frames": 6}) == [[3, 2, 8]]
    assert grid(message(video), videos_kwargs={"num_frames": 6}) == [[3, 2, 8]]
    assert grid(message(video | {"nframes": 4}), fps=2) == [[2, 2, 8]]
    assert grid(message(video), size={"shortest_edge": 3136, "longest_edge": 50176}) == [[5, 4, 16]]
    assert grid(message(video | {"max_pixels": 784, "min_pixels": 784})) == [[5, 2, 4]]
    # A message cannot exceed the processor's limit.
    assert grid(message(video | {"max_pixels": 50176})) == [[5, 2, 8]]
    assert grid(message(video | {"max_pixels": 50176}), max_pixels_per_frame=50176) == [[5, 4, 16]]
    processor.fps = 2
    assert grid(message(video)) == [[2, 2, 8]]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"max_pixel_per_frame": 1000}, "`max_pixel_per_frame` .*did you mean `max_pixels_per_frame`"),
        ({"videos_kwargs": {"nun_frames": 4}}, "`nun_frames` in `videos_kwargs`.*`num_frames`"),
        ({"images_kwargs": {"sise": 4}}, "`sise` in `images_kwargs`"),
        ({"fps": 2, "num_frames": 4}, "fps=2 and num_frames=4"),
        ({"fps": 2, "videos_kwargs": {"fps": 2}}, "`fps` was given twice"),
        ({"fps": 0}, "`fps` must be a positive number, got 0"),
        ({"fps": float("nan")}, "`fps` .* nan"),
        ({"fps": [1.0, 2.0]}, "`fps` has 2 entries for 1 videos"),
        ({"num_frames": 2.5}, "`num_frames` must be a positive integer, got 2.5"),
        ({"num_frames": True}, "`num_frames` .* True"),
        ({"max_total_tokens": -1}, "`max_total_tokens` .* -1"),
        ({"min_pixels_per_frame": 60000}, r"`min_pixels_per_frame` \(60000\) must not exceed"),
        ({"min_frames": 2}, "`min_frames` cannot be set"),
        ({"patch_size": 16}, "`patch_size` cannot be set"),
        ({"size": {"height": 28, "width": 28}}, "`size` must hold"),
        ({"do_sample_frames": False, "num_frames": 4}, "`num_frames`=4 contradicts"),
        ({"do_sample_frames": False, "fps": 4}, "`fps`=4 contradicts"),
        ({"do_resize": False}, "multiples of 28.*60x130"),
    ],
    ids=str,
)
def test_bad_options_are_named(processor, tmp_path, options, match):
    path = write_video(tmp_path / "a.mp4", [draw_frame(i, 1, 130, 60) for i in range(4)], 25)
    with pytest.raises(ValueError, match=match):
        apply(processor, message({"type": "video", "video": path}), **options)
    with pytest.raises(ValueError, match=match):
        processor(text=VIDEO, videos=path, **options)


@pytest.mark.parametrize(
    "part, match",
    [
        ({"fsp": 2}, "`fsp` in a video in a message.*`fps`"),
        ({"total_pixels": 20480}, "`total_pixels` in a video in a message"),
        ({"fps": 2, "nframes": 4}, "exclude each other"),
        ({"nframes": 4, "num_frames": 4}, "two names for one option"),
        ({"path": "b.mp4"}, "must be given once"),
    ],
    ids=str,
)
def test_bad_options_of_a_message_are_named(processor, part, match):
    with pytest.raises(ValueError, match=match):
        apply(processor, message({"type": "video", "video": "a.mp4"} | part))


def test_bad_defaults_are_named(processor):
    with pytest.raises(ValueError, match="exclude each other"):
        build_processor(fps=2.0, num_frames=8)
    with pytest.raises(ValueError, match="`max_total_tokens`"):
        build_processor(max_total_tokens=0)
    with pytest.raises(ValueError, match=r"`min_pixels_per_frame` \(3136\)"):
        build_processor(max_pixels_per_frame=784)
    with pytest.raises(ValueError, match=r"`fsp` is not an option"):
        processor.plan_video(VideoSource(10, 1.0, 56, 56), fsp=4)


def test_videos_and_placeholders_must_match(processor):
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    with pytest.raises(ValueError, match=r"has 1 <\|video_pad\|>, and `videos` has 2"):
        processor(text=VIDEO, videos=[frames, frames])
    with pytest.raises(ValueError, match="no video"):
        processor(text=VIDEO, videos=[])
    with pytest.raises(ValueError, match="`audio`"):
        processor(text="Hi", audio=np.zeros(10))


# Frames and arrays


def test_frames_in_every_form_are_the_same(processor, tmp_path):
    arrays = [numbered(i) for i in range(6)]
    paths = []
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    stacked = np.stack(arrays)
    forms = [
        [Image.fromarray(array) for array in arrays],
        paths,
        arrays,
        stacked,
        torch.from_numpy(stacked),
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        stacked.astype(np.float32),
    ]
    expected = apply(processor, message({"type": "video", "video": forms[0]}))
    assert expected["video_grid_thw"].tolist() == [[3, 4, 16]] and expected["second_per_grid_ts"].tolist() == [1.0]
    for form in forms:
        pixels = "rounded" if getattr(form, "dtype", None) == np.float32 else "equal"
        assert_same(apply(processor, message({"type": "video", "video": form})), expected, pixels=pixels)
        direct = processor(text=prompt(processor, message({"type": "video"})), videos=form, return_tensors="pt")
        assert_same(direct, expected, pixels=pixels)
        two = processor(text=[VIDEO + VIDEO], videos=[form, form], return_tensors="pt")
        assert two["video_grid_thw"].tolist() == [[3, 4, 16]] * 2


def test_frames_are_taken_as_sampled_unless_told_otherwise(processor):
    frames = np.stack([numbered(i) for i in range(20)])

    def call(**options):
        inputs = processor(text=VIDEO, videos=frames, return_tensors="pt", return_metadata=True, **options)
        return inputs["video_metadata"][0].frames_indices, inputs["second_per_grid_ts"].item()

    every = list(range(20))
    assert call() == (every, 1.0)
    assert call(fps=4) == (every, 0.5)
    assert call(num_frames=5) == ([0, 6, 13, 19], 5.0)
    assert call(fps=4, max_total_tokens=80)[1] == 1.0
    metadata = {"total_num_frames": 20, "fps": 10.0}
    assert call(video_metadata=metadata) == ([0, 6, 13, 19], 1.0)
    assert call(video_metadata=VideoMetadata(**metadata), fps=10) == (every, pytest.approx(0.2))
    sampled = {"total_num_frames": 200, "fps": 10.0, "frames_indices": list(range(0, 200, 10))}
    assert call(video_metadata=[sampled]) == (sampled["frames_indices"], 2.0)
    assert call(video_metadata=sampled, fps=0.5)[1] == 4.0
    assert call(video_metadata=metadata, do_sample_frames=False) == (every, pytest.approx(0.2))
    with pytest.raises(ValueError, match="`max_total_tokens`=80"):
        call(do_sample_frames=False, max_total_tokens=80)


@pytest.mark.parametrize(
    "video, match",
    [
        ([], "no frames"),
        (np.zeros((0, 56, 56, 3), np.uint8), "not empty"),
        (np.zeros((4, 4, 56, 4), np.uint8), "cannot tell the channels"),
        (np.zeros((4, 3, 56, 3), np.uint8), "cannot tell the channels"),
        (np.zeros((56, 56)), "3 to 5 dimensions as an array, got shape"),
        ([Image.new("RGB", (56, 56)), Image.new("RGB", (28, 28))], "one size"),
        (["a.png", "b.png"], "image a.png cannot be read"),
        (17, "holds a int"),
    ],
    ids=["none", "empty", "four channels", "three rows", "two axes", "two sizes", "missing files", "number"],
)
def test_frames_that_are_no_video(processor, video, match):
    with pytest.raises(ValueError, match=match):
        apply(processor, message({"type": "video", "video": video}))


def test_metadata_that_contradicts_the_frames(processor):
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    for metadata, match in [
        ({"total_num_frames": 5, "fps": 1.0}, "total_num_frames=5"),
        ({"total_num_frames": 9, "fps": 1.0, "frames_indices": [0, 1]}, "2 frames_indices"),
        ({"fps": 1.0}, "total_num_frames"),
        ([{"total_num_frames": 4}] * 2, "2 entries for 1 videos"),
    ]:
        with pytest.raises(ValueError, match=match):
            processor(text=VIDEO, videos=frames, video_metadata=metadata)
    with pytest.raises(ValueError, match="brings its own"):
        processor(text=VIDEO, videos="a.mp4", video_metadata={"total_num_frames": 4})


def test_text_and_images_alone(processor):
    assert set(apply(processor, message())) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    image = Image.fromarray(numbered(1))
    inputs = apply(processor, message({"type": "image", "image": image}))
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 16]]
    assert (inputs["mm_token_type_ids"] == 1).sum() == 16


# qwen-vl-utils


def via_qwen_vl_utils(processor, messages, with_metadata=False, **kwargs):
    """The way that Qwen2.5-VL's model card shows."""
    batch = messages if isinstance(messages[0], list) else [messages]
    images, videos, video_kwargs = process_vision_info(
        batch, return_video_kwargs=True, return_video_metadata=with_metadata
    )
    texts = [prompt(processor, single) for single in batch]
    return processor(text=texts, images=images, videos=videos, **video_kwargs, return_tensors="pt", **kwargs)


def read_whole_with_pyav(part):
    """A reader for qwen-vl-utils, whose own need decord, torchcodec or torchvision's removed reader."""
    with av.open(str(part["video"])) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    count = vision_process.smart_nframes(part, total_frames=len(frames), video_fps=rate)
    indices = torch.linspace(0, len(frames) - 1, count).round().long()
    metadata = {"fps": rate, "frames_indices": indices, "total_num_frames": len(frames), "video_backend": "pyav"}
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[indices], metadata, count / len(frames) * rate


@pytest.fixture
def qwen_reader(monkeypatch):
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "pyav")
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "pyav", read_whole_with_pyav)


@pytest.mark.parametrize("with_metadata", [False, True], ids=["fps", "metadata"])
@pytest.mark.parametrize("options", [{}, {"sample_fps": 4.0}], ids=str)
@pytest.mark.parametrize("size", [(240, 320), (224, 224), (480, 360)], ids=str)
@pytest.mark.parametrize("count", [8, 7])
def test_frame_lists_via_qwen_vl_utils(processor, count, size, options, with_metadata):
    frames = [Image.fromarray(draw_frame(i, 2, size[1], size[0])) for i in range(count)]
    messages = message({"type": "video", "video": frames, **options})
    # qwen-vl-utils resizes to its own limits first, so the pixels differ by a second interpolation.
    assert_same(via_qwen_vl_utils(processor, messages, with_metadata), apply(processor, messages), pixels="any")


@pytest.mark.parametrize("with_metadata", [False, True], ids=["fps", "metadata"])
@pytest.mark.parametrize("options", [{}, {"fps": 4.0}, {"fps": 30.0}, {"nframes": 6}], ids=str)
def test_files_via_qwen_vl_utils(processor, tmp_path, qwen_reader, options, with_metadata):
    """The same frames, resized once on either side: all is equal, but for the rounding of the interpolation."""
    path = write_video(tmp_path / "a.mp4", (draw_frame(i / 25, 1, 320, 240) for i in range(61)), 25)
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    messages = message({"type": "video", "video": str(path), **limits, **options})
    assert_same(via_qwen_vl_utils(processor, messages, with_metadata), apply(processor, messages), pixels="rounded")
    # Without limits of its own it resizes to 602,112 pixels at most, then our limit applies: tokens and timing agree.
    messages = message({"type": "video", "video": str(path), **options})
    assert_same(via_qwen_vl_utils(processor, messages, with_metadata), apply(processor, messages), pixels="any")


def test_batches_via_qwen_vl_utils(processor, tmp_path, qwen_reader):
    path = str(write_video(tmp_path / "a.mp4", (draw_frame(i / 25, 1, 320, 240) for i in range(50)), 25))
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    image = Image.fromarray(draw_frame(0, 1, 224, 224))
    batch = [
        message({"type": "image", "image": image}, {"type": "video", "video": path, "fps": 4.0, **limits}),
        message({"type": "video", "video": path, **limits}, {"type": "video", "video": path, "fps": 1.0, **limits}),
    ]
    one = via_qwen_vl_utils(processor, batch, padding=True)
    assert_same(one, apply(processor, batch, padding=True), pixels="rounded")
    assert one["second_per_grid_ts"].tolist() == [0.5, 1.0, 1.0]  # at 1 fps two frames are below the least of 4


def test_reader_for_qwen_vl_utils(processor, tmp_path, monkeypatch):
    path = str(numbered_video(tmp_path / "a.mp4", count=100))
    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
    try:
        processor.register_qwen_vl_utils_reader()
        messages = message({"type": "video", "video": path, "fps": 5.0, "min_pixels": 3136, "max_pixels": 50176})
        for with_metadata in (False, True):
            ours = apply(processor, messages)
            assert_same(via_qwen_vl_utils(processor, messages, with_metadata), ours, pixels="rounded")
        part = {"video": path, "nframes": 6, "video_start": 1.0, "video_end": 2.0}
        frames, metadata, rate = vision_process.VIDEO_READER_BACKENDS["pyav"](part)
        assert numbers(frames) == metadata["frames_indices"] == [25, 30, 35, 40, 45, 50]
        assert rate == pytest.approx(6 / 26 * 25)
        with pytest.raises(ValueError, match="no such video file"):
            process_vision_info(message({"type": "video", "video": "missing.mp4"}))
    finally:
        vision_process.get_video_reader_backend.cache_clear()


def test_tokens_are_those_of_qwens_processor(processor, tmp_path):
    """Frames within the limits become the tokens and the grid that transformers' Qwen2.5-VL processor makes."""
    save_tiny_qwen2_5_vl(tmp_path)
    qwen = Qwen2_5_VLProcessor.from_pretrained(tmp_path)
    frames = torch.from_numpy(np.stack([draw_frame(i, 2, 224, 112) for i in range(6)])).permute(0, 3, 1, 2)
    metadata = [VideoMetadata(total_num_frames=24, fps=8.0, frames_indices=list(range(0, 24, 4)))]
    text = prompt(processor, message({"type": "video"}))
    ours = processor(text=[text], videos=[frames], fps=[2.0], do_sample_frames=False, return_tensors="pt")
    theirs = qwen(text=[text], videos=[frames], video_metadata=metadata, return_tensors="pt")
    assert_same(ours, theirs)


# Saving and loading


def test_save_and_load(tmp_path):
    processor = build_processor(num_frames=8, max_frames=16, max_pixels_per_frame=28 * 28 * 16, max_total_tokens=1000)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored["auto_map"] == {"AutoProcessor": "processing_videonsa.VideoNSAProcessor"}
    assert stored["video_processor"]["size"] == {"shortest_edge": 3136, "longest_edge": 28 * 28 * 16}
    for name in (
        "processing_videonsa.py",
        "budget_videonsa.py",
        "files_videonsa.py",
        "frames_videonsa.py",
        "chat_template.jinja",
    ):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()

    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "VideoNSAProcessor" and loaded.chat_template == processor.chat_template
    names = ("fps", "num_frames", "max_frames", "min_pixels_per_frame", "max_pixels_per_frame", "max_total_tokens")
    for other in (loaded, VideoNSAProcessor.from_pretrained(tmp_path)):
        assert [getattr(other, name) for name in names] == [None, 8, 16, 3136, 28 * 28 * 16, 1000]
    frames = np.stack([numbered(i) for i in range(20)])
    messages = message({"type": "video", "video": frames})
    assert_same(apply(loaded, messages), apply(processor, messages))

    again = VideoNSAProcessor.from_pretrained(tmp_path, fps=4, max_pixels=50176)
    assert (again.fps, again.num_frames, again.max_pixels_per_frame) == (4, None, 50176)
    with pytest.raises(ValueError, match=r"`max_total_token` .*`max_total_tokens`"):
        VideoNSAProcessor.from_pretrained(tmp_path, max_total_token=10)
    assert VideoNSAProcessor.from_pretrained(tmp_path, size={"longest_edge": 6272}).max_pixels_per_frame == 6272
    with pytest.raises(ValueError, match="exclude each other"):
        VideoNSAProcessor.from_pretrained(tmp_path, fps=4, num_frames=4)
    with pytest.raises(ValueError, match="`min_frames` is not an option"):
        VideoNSAProcessor.from_pretrained(tmp_path, min_frames=2)


@pytest.fixture(scope="module")
def root_with_tokenizer(tmp_path_factory):
    """The repository's processor files with a tokenizer beside them, as in a finished checkpoint."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("processor_config.json", "chat_template.jinja", *(path.name for path in ROOT.glob("*_videonsa.py"))):
        shutil.copy(ROOT / name, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_root_is_a_processor(root_with_tokenizer, tmp_path):
    processor = AutoProcessor.from_pretrained(root_with_tokenizer, trust_remote_code=True)
    assert (processor.fps, processor.max_pixels_per_frame, processor.max_total_tokens) == (2.0, 50176, 131072)
    path = write_video(tmp_path / "a.mp4", (draw_frame(i / 5, 4, 320, 240) for i in range(100)), 5)
    inputs = apply(processor, message({"type": "video", "video": path}))
    assert inputs["video_grid_thw"].tolist() == [[20, 12, 18]] and inputs["second_per_grid_ts"].tolist() == [1.0]


def test_root_is_what_the_processor_saves(tmp_path, root_with_tokenizer):
    VideoNSAProcessor.from_pretrained(root_with_tokenizer).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor"):
        del saved[part]["auto_map"]  # transformers puts the processor's there too, where nothing reads it
    assert saved == json.loads((ROOT / "processor_config.json").read_text())


def test_plain_qwen_processor_reads_the_root(root_with_tokenizer):
    qwen = Qwen2_5_VLProcessor.from_pretrained(root_with_tokenizer)
    assert type(qwen.video_processor) is Qwen2VLVideoProcessor
    frames = np.stack([draw_frame(i, 2, 448, 448) for i in range(4)])
    grid = qwen(text=VIDEO, videos=frames, return_tensors="pt")["video_grid_thw"]
    assert grid.tolist() == [[2, 16, 16]]


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "video_url", "video_url": {"url": "clip.mp4"}}, "`type` .* got 'video_url'"),
        ({"type": "vidoe", "vidoe": "clip.mp4"}, "`type` .* got 'vidoe'"),
        ({"type": "video", "vidoe": "clip.mp4"}, "must be given as `video`, `url`, `path`, got type, vidoe"),
    ],
    ids=["video_url", "vidoe", "no video"],
)
def test_parts_that_the_template_would_leave_out(processor, part, match):
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)


def test_frames_without_timing_are_mentioned(processor, monkeypatch):
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    warnings = []
    monkeypatch.setattr("processing_videonsa.logger.warning_once", warnings.append)
    processor(text="<|video_pad|>", videos=[frames], fps=5)
    processor(text="<|video_pad|>", videos=[frames], video_metadata=[{"fps": 5, "total_num_frames": 4}])
    assert warnings == []
    processor(text="<|video_pad|>", videos=[frames])
    assert len(warnings) == 1 and "taken as sampled at 2.0 per second" in warnings[0]
