"""Messages: what is None is absent, options of images and videos apply, and nothing is ignored in silence."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from processor_testing import apply, build_processor, message, numbered, numbered_video
from qwen_vl_utils import process_vision_info
from transformers import Qwen2VLImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SEEN = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(numbered(3, 112, 112)).save(folder / "a.png")
    return {"image": str(folder / "a.png"), "video": str(numbered_video(folder / "a.mp4"))}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for module in ("processing_videonsa", "options_videonsa"):
        monkeypatch.setattr(f"{module}.logger.warning_once", said.append)
    return said


# None is absent


def conversations(media) -> tuple[list[list[dict]], list[str]]:
    """Conversations, and what they are rendered as."""
    both = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": media["video"], "fps": 1.0},
                {"type": "image", "image": media["image"], "max_pixels": 3136},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    plain = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    user, end = "<|im_start|>user\n", "<|im_end|>\n"
    rendered = [
        f"{SYSTEM}{user}{SEEN['video']}{SEEN['image']}What?{end}<|im_start|>assistant\nThat.{end}",
        f"<|im_start|>system\nBe brief.{end}{user}Hi{end}",
    ]
    return [both, plain], rendered


def test_messages_of_a_dataset(processor, media):
    """Arrow gives every part all keys of all parts."""
    given, rendered = conversations(media)
    table = Dataset.from_list([{"messages": conversation} for conversation in given])
    assert table[1]["messages"][1]["content"][0] == dict.fromkeys(("video", "fps", "image", "max_pixels")) | {
        "type": "text",
        "text": "Hi",
    }
    # A table of pandas has arrays for lists (and floats for the integers of columns with gaps, which are refused).
    assert processor.apply_chat_template(list(table.to_pandas()["messages"]), tokenize=False) == rendered
    for batch in (table[:]["messages"], table["messages"], [row["messages"] for row in table]):
        assert processor.apply_chat_template(batch, tokenize=False) == rendered
        inputs = apply(processor, batch, padding=True)
        expected = apply(processor, given, padding=True)
        assert set(inputs) == set(expected) and all(torch.equal(inputs[key], expected[key]) for key in expected)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]] and inputs["video_grid_thw"].tolist() == [[2, 4, 16]]
    # Without this processor: by the tokenizer, or by Jinja alone.
    assert render_jinja_template(table[:]["messages"], chat_template=processor.chat_template)[0] == rendered
    for row, text in zip(table, rendered, strict=True):
        options = {"chat_template": processor.chat_template, "tokenize": False}
        assert processor.tokenizer.apply_chat_template(row["messages"], **options) == text


def test_images_of_a_dataset(processor, media):
    part = {"type": Value("string"), "image": ImageFeature(), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    rows = [{"messages": message({"type": "image", "image": media["image"]}, text="?")}]
    (row,) = Dataset.from_list(rows, features=features)
    assert isinstance(row["messages"][0]["content"][0]["image"], Image.Image)
    assert row["messages"][0]["content"][1]["image"] is None
    inputs, expected = apply(processor, row["messages"]), apply(processor, rows[0]["messages"])
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("tokenize", [False, True], ids=["text", "tokens"])
@pytest.mark.parametrize(
    "messages, expected",
    [
        (
            [{"role": "assistant", "content": None, "tool_calls": None, "reasoning": None}],
            SYSTEM + "<|im_start|>assistant\n<|im_end|>\n",
        ),
        ([{"role": "assistant"}], SYSTEM + "<|im_start|>assistant\n<|im_end|>\n"),
        (
            [{"role": "user", "content": "Hi", "tool_calls": [], "refusal": None, "annotations": []}, None],
            SYSTEM + "<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            [{"role": "user", "content": [None, {"type": None, "text": "Hi"}, {"type": None, "image": None}]}],
            SYSTEM + "<|im_start|>user\nHi<|im_end|>\n",
        ),
        (
            [{"role": "user", "content": [{"text": "Hi", "image": {"bytes": None, "path": None}, "type": "text"}]}],
            SYSTEM + "<|im_start|>user\nHi<|im_end|>\n",
        ),
    ],
    ids=["no content", "no key", "empty lists", "parts", "empty struct"],
)
def test_none_is_absent(processor, messages, expected, tokenize):
    if not tokenize:
        assert processor.apply_chat_template(messages, tokenize=False) == expected
        assert render_jinja_template([[one for one in messages if one]], chat_template=processor.chat_template)[0] == [
            expected
        ]
    else:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        ids = processor.apply_chat_template(messages, **options)["input_ids"]
        assert torch.equal(ids, processor.tokenizer(expected, return_tensors="pt")["input_ids"])


# Nothing is ignored


@pytest.mark.parametrize("tokenize", [False, True], ids=["text", "tokens"])
@pytest.mark.parametrize(
    "messages, match",
    [
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
            "`tool_calls` of a message would be ignored",
        ),
        ([{"role": "user", "content": "Hi", "name": "Bo"}], "`name` of a message would be ignored"),
        ([{"content": "Hi"}], "`role` of a message must be a text, got None"),
        ([{"role": "user", "content": 5}], "`content` of a message must be .* got 5"),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], "`content` of a message must be"),
        (
            [{"role": "user", "content": ["an image of it"]}],
            "a part of a message must be a mapping, got 'an image of it'",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi", "fps": 2}]}], "`fps` in a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi", "video": "a.mp4"}]}], "`video` in a text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "must be given as `text`, got None"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "`type` .* got 'audio'"),
        ([{"role": "user", "content": [{"image": "a.png", "video": "a.mp4"}]}], "needs a `type`"),
        (["Hi"], "a message must be a mapping .* got 'Hi'"),
        ("Hi", "a conversation must be a list of messages, got 'Hi'"),
        ([], "a conversation must be a list of messages"),
    ],
    ids=str,
)
def test_what_the_template_would_ignore(processor, messages, match, tokenize):
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template(messages, tokenize=tokenize)


def test_tools_and_documents_need_a_template_for_them(processor):
    hello = [{"role": "user", "content": "Hi", "name": "Bo"}]
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"`{name}` would be ignored"):
            processor.apply_chat_template([{"role": "user", "content": "Hi"}], **{name: [{"a": 1}]})
    template = "{% for message in messages %}{{ message.name }}{% endfor %}{{ tools | length }}"
    assert processor.apply_chat_template(hello, chat_template=template, tools=[{"a": 1}]) == "Bo1"


def test_media_belong_into_messages(processor, media):
    full = message({"type": "image", "image": media["image"]})
    with pytest.raises(ValueError, match="`images` cannot be given beside messages"):
        apply(processor, full, processor_kwargs={"images": [Image.open(media["image"])]})
    with pytest.raises(ValueError, match="`images` cannot be given beside messages"):
        apply(processor, full, images=[Image.open(media["image"])])
    with pytest.raises(ValueError, match="`videos` cannot be given beside messages"):
        apply(processor, message(), processor_kwargs={"videos": [media["video"]]})


@pytest.mark.parametrize("keywords", [{"images": None}, {"images": [], "videos": None, "audio": ()}], ids=str)
def test_media_that_are_none(keywords, processor, media):
    full = message({"type": "image", "image": media["image"]})
    expected = apply(processor, full)
    for found in (apply(processor, full, **keywords), apply(processor, full, processor_kwargs=keywords)):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


TAKES_IMAGES = "_multimodal_inputs_from_conversations"  # transformers 5.23 and later


def test_images_whose_places_messages_mark(processor, media, monkeypatch):
    marked, picture = message({"type": "image"}), Image.open(media["image"])
    if hasattr(ProcessorMixin, TAKES_IMAGES):
        expected = apply(processor, message({"type": "image", "image": media["image"]}))
        found = apply(processor, marked, processor_kwargs={"images": [picture]})
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        monkeypatch.delattr(ProcessorMixin, TAKES_IMAGES)
    with pytest.raises(ValueError, match="`images` for messages that only mark their places needs transformers"):
        apply(processor, marked, processor_kwargs={"images": [picture]})


# Options of images


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, (112, 112)),
        ({"max_pixels": 3136}, (56, 56)),
        ({"max_pixels": np.int64(3136)}, (56, 56)),
        ({"min_pixels": 168 * 168}, (168, 168)),
        ({"resized_height": 28, "resized_width": 140}, (28, 140)),
        ({"resized_height": 60, "resized_width": 50}, (56, 56)),
        ({"max_pixels": 784, "min_pixels": None}, (28, 28)),
    ],
    ids=str,
)
def test_options_of_an_image(processor, media, options, size):
    part = {"type": "image", "image": media["image"], **options}
    inputs = apply(processor, message(part))
    assert inputs["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    if options.get("max_pixels") != 784:  # less than qwen-vl-utils' least
        part = {key: value for key, value in part.items() if value is not None}
        assert process_vision_info(message(part))[0][0].size == size[::-1]
    # The pixels are those of an image processor with that size.
    stock = Qwen2VLImageProcessor(min_pixels=size[0] * size[1], max_pixels=size[0] * size[1])
    if size[0] == size[1]:
        assert torch.equal(inputs["pixel_values"], stock(Image.open(media["image"]))["pixel_values"])


def test_options_of_one_image_leave_others_alone(processor, media):
    part = {"type": "image", "image": media["image"]}
    small = part | {"max_pixels": 3136}
    alone = [apply(processor, message(one))["pixel_values"] for one in (small, part)]
    inputs = apply(processor, message(small, part))
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 8, 8]]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))
    # The limits of the call hold for both, and are limits.
    inputs = apply(processor, message(small, part | {"max_pixels": 20000}), max_pixels=6272)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]


def test_an_image_cannot_exceed_the_limit(processor, media, warnings):
    part = {"type": "image", "image": Image.new("RGB", (560, 560))}
    for options in ({"max_pixels": 10**6}, {"resized_height": 560, "resized_width": 560}):
        assert apply(processor, message(part | options))["image_grid_thw"].tolist() == [[1, 16, 16]]
        assert "the limit of 50176 pixels applies" in warnings.pop()
        grid = apply(processor, message(part | options), max_pixels=10**6)["image_grid_thw"]
        assert grid.tolist() == [[1, 40, 40]] and not warnings


@pytest.mark.parametrize(
    "part, match",
    [
        ({"max_pixls": 3136}, "`max_pixls` in an image .*`max_pixels`"),
        ({"fps": 2}, "`fps` in an image"),
        ({"max_pixels": True}, "`max_pixels` must be a positive integer, got True"),
        ({"max_pixels": 3136.0}, "`max_pixels` .* 3136.0"),
        ({"min_pixels": 9000, "max_pixels": 3136}, "`min_pixels` of an image must not exceed"),
        ({"resized_height": 56}, "`resized_height` and `resized_width` of an image go together"),
        ({"path": "b.png"}, "an image in a message must be given once, got `image`, `path`"),
        ({"image": {"url": "a.png", "detail": "high"}}, "`detail`='high'"),
        ({"image": {"url": "a.png", "quality": 3}}, "`quality` in `image`"),
        ({"image": None, "max_pixels": 3136}, "must be given as `image`, .* got type, max_pixels"),
    ],
    ids=str,
)
def test_bad_options_of_an_image_are_named(processor, media, part, match):
    with pytest.raises(ValueError, match=match):
        apply(processor, message({"type": "image", "image": media["image"]} | part))


def test_a_kept_size_contradicts_options(processor, media):
    parts = {"type": "image", "max_pixels": 3136}, {"type": "video", "resized_height": 56, "resized_width": 56}
    for part, match in zip(parts, ("options of an image", "`resized_height`=56 of a video"), strict=True):
        with pytest.raises(ValueError, match=f"`do_resize`=False contradicts .*{match}"):
            apply(processor, message(part | {part["type"]: media[part["type"]]}), do_resize=False)


def test_images_in_every_place(processor, media):
    expected = apply(processor, message({"type": "image", "image": media["image"]}))
    for part in (
        {"type": "image", "path": media["image"]},
        {"type": "image", "url": f"file://{media['image']}"},
        {"type": "image_url", "image_url": {"url": media["image"], "detail": "auto"}},
        {"image_url": media["image"]},
        {"image": media["image"], "text": None},
    ):
        inputs = apply(processor, message(part))
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


# Options of videos: the message before the call before the default


def test_resized_sides_of_a_video(processor, media, warnings):
    video = {"type": "video", "video": media["video"], "num_frames": 2}
    for sides, grid in (((28, 112), [1, 2, 8]), ((112, 56), [1, 8, 4]), ((60, 50), [1, 4, 4])):
        part = video | dict(zip(("resized_height", "resized_width"), sides, strict=True))
        assert apply(processor, message(part))["video_grid_thw"].tolist() == [grid]
    assert not warnings
    part = video | {"resized_height": 448, "resized_width": 448}
    assert apply(processor, message(part))["video_grid_thw"].tolist() == [[1, 16, 16]]
    assert "the limit of 50176 applies" in warnings[0]
    # The budget of a prompt holds for them too.
    assert apply(processor, message(part), max_total_tokens=16)["video_grid_thw"].tolist() == [[1, 8, 8]]


@pytest.mark.parametrize(
    "part, call, steps, said",
    [
        ({"fps": 1}, {"num_frames": 8}, 2, "num_frames=8 of the call gives way to fps=1 of a video in a message"),
        ({"fps": 4}, {"fps": 2}, 4, "fps=2 of the call gives way to fps=4"),
        ({"num_frames": 8}, {"fps": 2}, 4, "fps=2 of the call gives way to num_frames=8"),
        ({"num_frames": 8}, {"max_frames": 4}, 4, "max_frames=4 of the call gives way to num_frames=8"),
        ({"fps": 4, "max_frames": 8}, {"max_frames": 4}, 4, "max_frames=4 of the call gives way to max_frames=8"),
        ({"fps": 4, "max_frames": 4}, {"max_frames": 8}, 2, None),
        ({"fps": 2}, {"fps": 2.0}, 2, None),
        ({"num_frames": 4}, {"max_frames": 8}, 2, None),
        ({}, {"num_frames": 8}, 4, None),
    ],
    ids=str,
)
def test_the_message_goes_before_the_call(processor, media, warnings, part, call, steps, said):
    inputs = apply(processor, message({"type": "video", "video": media["video"], **part}), **call)
    assert inputs["video_grid_thw"].tolist() == [[steps, 4, 16]]
    assert warnings == [] if said is None else said in warnings[0]


@pytest.mark.parametrize("option", ["total_pixels", "video_start", "video_end", "min_frames", "raw_fps"])
def test_options_of_qwen_vl_utils_that_are_refused(processor, media, option):
    with pytest.raises(ValueError, match=f"`{option}` in a video in a message is not supported: "):
        apply(processor, message({"type": "video", "video": media["video"], option: 2}))
    # Whoever renders the text alone reads the video otherwise.
    processor.apply_chat_template(message({"type": "video", "video": media["video"], option: 2}), tokenize=False)
