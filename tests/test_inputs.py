"""What a call of the processor is given: every form of a video, options that would be ignored, processors with a size."""

import numpy as np
import pytest
from PIL import Image
from processor_testing import apply, build_processor, message, numbered, numbered_video
from tiny_random import tiny_tokenizer
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from processing_videonsa import VideoNSAProcessor

FRAMES = np.stack([numbered(i, width=56) for i in range(8)])


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """50 frames in 2 seconds, 56x224 pixels."""
    return {"type": "video", "video": str(numbered_video(tmp_path_factory.mktemp("video") / "a.mp4"))}


def test_videos_in_messages_take_what_calls_take(processor):
    def grid(video):
        return apply(processor, message({"type": "video", "video": video}))["video_grid_thw"].tolist()

    picture = Image.fromarray(FRAMES[0])
    assert grid(picture) == grid([picture]) == grid(FRAMES[0]) == [[1, 4, 4]]
    assert grid(FRAMES[None]) == grid([FRAMES]) == grid(list(FRAMES[..., 0])) == [[4, 4, 4]]
    assert grid((FRAMES, {"fps": 4.0, "total_num_frames": 8})) == [[2, 4, 4]]
    with pytest.raises(ValueError, match="holds 2 videos where one is meant"):
        grid([FRAMES, FRAMES])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_given_as_a_video_is_upright(processor, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(numbered(5, 56, 112)).save(path, exif=exif)
    for given in (path, str(path), path.as_uri()):
        inputs = apply(processor, message({"type": "video", "video": given}))
        assert inputs["video_grid_thw"].tolist() == [[1, 8, 4]]
    plan = processor.plan_video(path, do_sample_frames=True)
    assert (plan.num_frames, plan.height, plan.width) == (1, 112, 56)


def test_do_sample_frames_of_frames(processor):
    def seen(**options):
        inputs = processor(text="<|video_pad|>", videos=[FRAMES], return_tensors="pt", **options)
        return inputs["video_grid_thw"][0, 0].item(), inputs["second_per_grid_ts"].item()

    sampled = {"total_num_frames": 16, "fps": 8.0, "frames_indices": list(range(0, 16, 2))}
    assert seen(video_metadata=sampled) == (4, 0.5)
    assert seen(video_metadata=sampled, do_sample_frames=True) == (2, 1.0)
    assert seen(do_sample_frames=True, num_frames=4) == (2, 2.0)
    for rate in (None, 4):  # a rate alone says how they were sampled
        with pytest.raises(ValueError, match="`do_sample_frames`=True needs `num_frames`, or the timing"):
            seen(do_sample_frames=True, fps=rate)
    # transformers turns a rate in `apply_chat_template` into `do_sample_frames=True`, which nobody asked for.
    inputs = apply(processor, message({"type": "video", "video": list(FRAMES)}), fps=4)
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 4]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"text_kwargs": {"paddin": True}}, "`paddin` in `text_kwargs`"),
        ({"audio_kwargs": {"sampling_rate": 1}}, "`sampling_rate` in `audio_kwargs`"),
        ({"common_kwargs": {"foo": 1}}, "`foo` is not an option"),
        ({"images_kwargs": {"do_pad": True}}, "`do_pad` cannot be set"),
        ({"images_kwargs": {"patch_size": 16}}, "`patch_size` cannot be set"),
        ({"do_center_crop": True}, "`do_center_crop` cannot be set"),
        ({"do_convert_rgb": False}, "`do_convert_rgb` cannot be set"),
        ({"default_to_square": True}, "`default_to_square` cannot be set"),
        ({"do_sample_frames": 1}, "`do_sample_frames` must be True, False or None, got 1"),
        ({"load_audio_from_video": True}, "`load_audio_from_video`"),
        ({"fps": 2, "processor_kwargs": {"fps": 2}}, "`fps` was given twice"),
    ],
    ids=str,
)
def test_keywords_that_would_be_ignored(processor, video, options, match):
    with pytest.raises(ValueError, match=match):
        apply(processor, message(video), **options)


def test_keywords_that_are_none(processor, video):
    inputs = apply(processor, message(video), images_kwargs=None, videos_kwargs=None, do_pad=False, do_convert_rgb=True)
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 16]]


@pytest.mark.parametrize("key", ["fps", "videos", "image"])
def test_keys_of_messages_count_where_a_template_asks_messages_for_them(processor, key):
    """The words `videos` and `image` are in our template, which does not look for them in a message."""
    messages = [{"role": "user", "content": "Q", key: ["a"]}]
    with pytest.raises(ValueError, match=f"`{key}` of a message would be ignored"):
        processor.apply_chat_template(messages)
    template = "{% for turn in messages %}{{ turn['" + key + "'][0] }}{% endfor %}"
    assert processor.apply_chat_template(messages, chat_template=template) == "a"


def test_a_video_processor_keeps_what_it_brings(tmp_path):
    def build(video_processor, **options) -> VideoNSAProcessor:
        return VideoNSAProcessor(Qwen2VLImageProcessor(max_pixels=6272), tiny_tokenizer(), video_processor, **options)

    size = {"shortest_edge": 6272, "longest_edge": 100352}
    processor = build(Qwen2VLVideoProcessor(size=size))
    assert (processor.min_pixels_per_frame, processor.max_pixels_per_frame) == (6272, 100352)
    assert dict(processor.video_processor.size) == size and processor.image_processor.size["longest_edge"] == 6272
    assert build(Qwen2VLVideoProcessor(max_pixels=784 * 9)).max_pixels_per_frame == 784 * 9
    assert build(Qwen2VLVideoProcessor(), max_pixels_per_frame=784 * 9).max_pixels_per_frame == 784 * 9
    assert build(Qwen2VLVideoProcessor(fps=4)).fps == 4
    with pytest.raises(
        ValueError, match="`max_pixels_per_frame`=50176 contradicts `video_processor`, which has 100352"
    ):
        build(Qwen2VLVideoProcessor(size=size), max_pixels_per_frame=50176)
    with pytest.raises(ValueError, match="`video_processor` has min_frames=8"):
        build(Qwen2VLVideoProcessor(min_frames=8))

    processor.save_pretrained(tmp_path)
    assert VideoNSAProcessor.from_pretrained(tmp_path).max_pixels_per_frame == 100352
    # What is asked of `from_pretrained` goes before what was saved.
    changed = VideoNSAProcessor.from_pretrained(tmp_path, max_pixels_per_frame=50176)
    assert changed.max_pixels_per_frame == changed.video_processor.size["longest_edge"] == 50176
