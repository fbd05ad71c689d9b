"""Images in messages and frames of videos are read by one rule: upright, on white, values from 0 to 255."""

import io

import decord
import numpy as np
import pytest
import torch
from PIL import Image
from processor_testing import apply, build_processor, message, numbered
from qwen_vl_utils.vision_process import to_rgb as qwen_to_rgb
from torchvision import tv_tensors

VIDEO, IMAGE = "<|video_pad|>", "<|image_pad|>"
RED, GREEN, WHITE = [255, 0, 0], [0, 255, 0], [255, 255, 255]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def shown(processor, inputs, kind: str) -> np.ndarray:
    """(height, width, 3): the first picture that the model is given, as pixels."""
    suffix = "_videos" if kind == "video" else ""
    steps, height, width = inputs[f"{kind}_grid_thw"][0].tolist()
    patches = inputs[f"pixel_values{suffix}"].reshape(steps, height // 2, width // 2, 2, 2, 3, 2, 14, 14)
    pictures = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * steps, 14 * height, 14 * width, 3)
    scale = processor.video_processor
    pixels = pictures[0] * torch.tensor(scale.image_std) + torch.tensor(scale.image_mean)
    return (pixels * 255).round().int().numpy()


def as_image(processor, picture, **options) -> np.ndarray:
    inputs = apply(processor, message({"type": "image", "image": picture}), **options)
    return shown(processor, inputs, "image")


def as_frame(processor, picture, **options) -> np.ndarray:
    inputs = apply(processor, message({"type": "video", "video": [picture] * 2, "sample_fps": 2}), **options)
    return shown(processor, inputs, "video")


# Upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(processor, tmp_path, orientation):
    stored = numbered(5, 56, 112)
    stored[:28, :56] = RED
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.png")
    Image.fromarray(stored).save(path, exif=exif)
    # EXIF 2.3, 4.6.4 A: where the first row and the first column of the stored picture are seen.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    for picture in (path, Image.open(path)):
        assert np.array_equal(as_image(processor, picture), upright)
        assert np.array_equal(as_frame(processor, picture), upright)


def test_broken_exif_data_tells_nothing(processor):
    picture = Image.new("RGB", (56, 56), (255, 0, 0))
    for exif in (b"no exif data", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        picture.info["exif"] = exif
        assert (as_image(processor, picture) == RED).all() and (as_frame(processor, picture) == RED).all()


# On white


def reopened(image: Image.Image, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    file.seek(0)
    return Image.open(file)


def half_transparent(mode: str) -> Image.Image:
    """Black on the left; on the right a black that is transparent."""
    alpha = np.zeros((56, 56), np.uint8)
    alpha[:, :28] = 255
    image = Image.fromarray(np.dstack([np.zeros_like(alpha)] * 3 + [alpha]))
    if mode == "RGBA":
        return image
    if mode in ("LA", "PA", "RGBa"):
        return image.convert(mode)
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode.startswith("P "):  # black twice, of which the first is transparent
        image = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        image.putpalette([0] * 768)
        return reopened(image, transparency={"P index": 0, "P bytes": b"\0\xff"}[mode])
    values = (alpha > 0).astype(np.uint8)  # 0 is transparent, 1 nearly black
    if mode == "I;16":
        return reopened(Image.fromarray(values.astype(np.uint16)), transparency=0)
    image = Image.fromarray(values)
    return reopened(image.convert(mode), transparency=(0, 0, 0) if mode == "RGB" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P index", "P bytes", "L", "RGB", "I;16"])
def test_what_shines_through_is_white(processor, mode):
    picture = half_transparent(mode)
    for pixels in (as_image(processor, picture), as_frame(processor, picture)):
        assert pixels[:, :28].max() <= 1 and pixels[:, 28:].min() == 255


def test_translucent_pixels_are_those_of_qwen_vl_utils(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 4), dtype=np.uint8))
    expected = np.asarray(qwen_to_rgb(image))
    pixels = np.array(image)
    for picture in (image, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.array_equal(as_image(processor, picture), expected)
        assert np.array_equal(as_frame(processor, picture), expected)
    # Floats are not rounded between blending and normalising.
    assert np.abs(as_frame(processor, pixels.astype(np.float32)) - expected).max() <= 1


def test_arrays_with_alpha(processor):
    frames = np.zeros((4, 56, 84, 4), np.uint8)
    frames[..., :42, :] = (255, 0, 0, 255)
    frames[..., 42:, :] = (0, 255, 0, 0)
    grey = frames[..., [1, 3]]
    for video, left in (
        (frames, RED),
        (frames.transpose(0, 3, 1, 2), RED),
        (grey, [0] * 3),
        (grey.transpose(0, 3, 1, 2), [0] * 3),
        (list(frames), RED),
        (frames[0], RED),
    ):
        pixels = shown(processor, processor(text=VIDEO, videos=video, fps=2, return_tensors="pt"), "video")
        assert (pixels[:, :42] == left).all() and (pixels[:, 42:] == WHITE).all()


def test_flatten_alpha_rounds_and_keeps_leading_axes():
    from pictures_videonsa import flatten_alpha

    colour, alpha = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    pixels = np.stack([colour, 255 - colour, colour // 2, alpha], -1).astype(np.uint8)
    exact = (pixels[..., :3] * (alpha / 255)[..., None] + 255 - alpha[..., None]).round()
    assert np.array_equal(flatten_alpha(pixels), exact)
    assert np.array_equal(flatten_alpha(pixels[None, None]), exact[None, None])
    opaque = pixels | np.array([0, 0, 0, 255], np.uint8)
    assert np.array_equal(flatten_alpha(opaque), opaque[..., :3])


def test_modes_without_transparency(processor):
    grey = np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 16
    scaled = np.repeat(((grey / 65535) * 255).round()[..., None], 3, -1)
    for order in ("<", ">"):
        data = grey.astype(f"{order}u2").tobytes()
        picture = Image.frombytes("I;16" if order == "<" else "I;16B", (56, 56), data)
        assert np.array_equal(as_image(processor, picture), scaled)
        assert np.array_equal(as_frame(processor, picture), scaled)
    rgb = numbered(9, 56, 56)
    for mode in ("1", "L", "P", "CMYK", "RGBX", "I", "F"):
        picture = Image.fromarray(rgb).convert(mode)
        assert np.array_equal(as_image(processor, picture), rgb)
        assert np.array_equal(as_frame(processor, picture), rgb)
    for mode, dtype, value, match in (
        ("I", np.int32, 1000, "of mode `I` holds values from 1000 to 1000"),
        ("F", np.float32, np.nan, "not all numbers"),
        ("F", np.float32, 0.5, "divided by 255"),
    ):
        picture = Image.fromarray(np.full((56, 56), value, dtype))
        assert picture.mode == mode
        for read in (as_image, as_frame):
            with pytest.raises(ValueError, match=match):
                read(processor, picture)


def test_the_first_picture_of_an_animation(processor, tmp_path):
    pictures = [Image.new("RGB", (56, 56), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        for read in (as_image, as_frame):
            animation.seek(0)
            assert (read(processor, animation) == RED).all()
            animation.seek(1)
            assert (read(processor, animation) == GREEN).all()


# Arrays of every kind


class WithArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class WithDlpack:
    def __init__(self, array):
        self.tensor = torch.from_numpy(array)

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class FrameBatch:
    """As torchcodec's: no array, its frames are `data`, (T, C, H, W)."""

    def __init__(self, array, seconds):
        self.data, self.pts_seconds = torch.from_numpy(array.transpose(0, 3, 1, 2)), torch.tensor(seconds)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS = {
    "reversed channels": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "reversed time": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "upside down": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "column order": np.asfortranarray,
    "a part": lambda a: np.concatenate([a, a], 2)[:, :, : a.shape[2]],
    "read only": read_only,
    "big endian": lambda a: a.astype(">u2"),
    "big endian floats": lambda a: a.astype(">f4"),
    "long double": lambda a: a.astype(np.longdouble),
    "bfloat16": lambda a: torch.from_numpy(a).to(torch.bfloat16),
    "torch uint16": lambda a: torch.from_numpy(a).to(torch.uint16),
    "bool": lambda a: a > 0,
    "torch bool": lambda a: torch.from_numpy(a) > 0,
    "one channel": lambda a: a[..., :1],
    "opaque": lambda a: np.concatenate([a, np.full_like(a[..., :1], 255)], -1),
    "decord": decord.nd.array,
    "__array__": WithArray,
    "__dlpack__": WithDlpack,
    "torchvision": lambda a: tv_tensors.Video(torch.from_numpy(a).permute(0, 3, 1, 2)),
    **{name: lambda a, name=name: a.astype(name) for name in ("int16", "int64", "uint16", "uint64")},
    **{name: lambda a, name=name: a.astype(name) for name in ("float16", "float32", "float64")},
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_every_kind(processor, form):
    """Pictures of 0 and 255, of a size that is kept: nothing is rounded, and every form is the same to the last bit."""
    frames = np.stack([numbered(i) for i in (5, 6, 7, 11)])
    assert set(np.unique(frames)) == {0, 255}

    def patches(video):
        inputs = processor(text=VIDEO, videos=video, fps=2, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[2, 4, 16]]
        return inputs["pixel_values_videos"]

    expected = patches(frames)
    assert expected.dtype == torch.float32
    assert torch.equal(patches(FORMS[form](frames)), expected)
    image, plain = FORMS[form](frames[1:2]), Image.fromarray(frames[1])
    images = [processor(text=IMAGE, images=one, return_tensors="pt")["pixel_values"] for one in (image, plain)]
    assert torch.equal(*images)


def test_frames_of_one_video_may_differ_in_kind(processor):
    frames = [numbered(i) for i in range(4)]
    mixed = [Image.fromarray(frames[0]), frames[1][..., :1], torch.from_numpy(frames[2]).permute(2, 0, 1)]
    mixed.append(Image.fromarray(frames[3]).convert("LA"))
    both = [processor(text=VIDEO, videos=video, fps=2, return_tensors="pt") for video in (frames, mixed)]
    assert torch.equal(both[0]["pixel_values_videos"], both[1]["pixel_values_videos"])


def test_batches_of_torchcodec_tell_their_times(processor):
    frames = np.stack([numbered(i) for i in range(10)])
    batch = FrameBatch(frames, [0.25 * i for i in range(10)])
    plain = processor(text=VIDEO, videos=frames, fps=4, return_tensors="pt")
    for inputs in (
        processor(text=VIDEO, videos=batch, return_tensors="pt"),
        apply(processor, message({"type": "video", "video": batch})),
    ):
        assert torch.equal(inputs["pixel_values_videos"], plain["pixel_values_videos"])
        assert inputs["second_per_grid_ts"].tolist() == [0.5]
    assert processor(text=VIDEO, videos=batch, fps=1.6, return_tensors="pt")["video_grid_thw"].tolist() == [[2, 4, 16]]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda a: a.astype(np.uint16) * 257, "holds values from 0 to 65535"),
        (lambda a: a.astype(int) - 1, "holds values from -1 to 254"),
        (lambda a: a.astype(np.float32) + 1, "holds values from 1 to 256"),
        (lambda a: np.where(a > 0, np.nan, 0), "not all numbers"),
        (lambda a: (a / 300).astype(np.float32), r"holds values from 0 to 0\.85.*divided by 255"),
        (lambda a: a.astype(complex), "dtype complex128"),
        (lambda a: a.astype(object), "dtype object"),
        (lambda a: a.astype(str), "dtype <U"),
        (lambda a: torch.from_numpy(a).to_sparse(), "sparse"),
        (lambda a: np.concatenate([a, a], -1)[..., :5], r"cannot tell the channels \(1 to 4\)"),
    ],
    ids=["16 bits", "negative", "256", "nan", "0 to 1", "complex", "object", "text", "sparse", "5 channels"],
)
def test_values_that_are_no_pixels(processor, change, match):
    frames = np.stack([numbered(i) for i in range(4)])
    with pytest.raises(ValueError, match=f"`videos`.*{match}"):
        processor(text=VIDEO, videos=change(frames), fps=2)
    with pytest.raises(ValueError, match=f"`images`.*{match}"):
        processor(text=IMAGE, images=change(frames)[1])


def test_scaled_floats_are_said_to_be_scaled(processor):
    frames = np.stack([numbered(i) for i in range(4)])
    alpha = np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)
    expected = processor(text=VIDEO, videos=frames, fps=2, return_tensors="pt")["pixel_values_videos"]
    for video in (frames, alpha):
        scaled = (video / 255).astype(np.float32)
        got = processor(text=VIDEO, videos=scaled, fps=2, do_rescale=False, return_tensors="pt")["pixel_values_videos"]
        torch.testing.assert_close(got, expected)  # the division by 255 is rounded elsewhere


def test_grey_frames_without_an_axis_of_channels(processor):
    grey = np.zeros((4, 56, 84), np.uint8)
    with pytest.raises(ValueError, match="cannot tell whether"):
        processor(text=VIDEO, videos=grey, fps=2)
    assert (as_image(processor, grey[0]) == 0).all()


@pytest.mark.parametrize(
    "image, match",
    [
        ("missing.png", "missing.png cannot be read"),
        (None, "holds a NoneType"),
        ({"bytes": b""}, "holds a dict"),
        (np.zeros((56, 0, 3)), "not empty"),
    ],
    ids=["missing", "none", "dict", "empty"],
)
def test_images_that_are_none(processor, image, match):
    with pytest.raises(ValueError, match=f"`images`.*{match}"):
        processor(text=IMAGE, images=[image])


def test_no_error_prints_a_payload(processor):
    payload = "data:image/png;base64," + "QUJD" * 5000
    for part in ({"type": "image", "image": payload}, {"type": "video", "video": [f"{payload}.png"] * 2}):
        with pytest.raises(ValueError) as caught:
            apply(processor, message(part))
        assert len(str(caught.value)) < 400
