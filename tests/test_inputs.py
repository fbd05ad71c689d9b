"""Videos in every form that a call takes, in messages too, and keys of messages that a template asks for."""

import numpy as np
import pytest
from PIL import Image
from processor_testing import apply, build_processor, message, numbered, numbered_video

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
