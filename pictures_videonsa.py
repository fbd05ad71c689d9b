"""Pictures as their callers give them: images in messages and frames of videos, read by one rule.

- Upright: the EXIF orientation is applied to files and to PIL images alike, as in transformers' `load_image`.
- On white: what shines through is white, as in qwen-vl-utils. This holds for every PIL mode with transparency and for
  arrays with four channels (colours and alpha) or two (grey and alpha), whose colours are not premultiplied.
- Values from 0 to 255: integers of any type, or floats. True and False are white and black. PIL's 16-bit modes are
  scaled to 8 bits; its modes without a range, I and F, are taken from 0 to 255. Other values are errors: what scale
  they have, nobody said.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

try:
    from .rgb_videonsa import on_white
    from .sources_videonsa import is_reference, resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from rgb_videonsa import on_white
    from sources_videonsa import is_reference, resolve_source

logger = logging.get_logger(__name__)

WHITE = 255.0

_CHANNELS = (1, 2, 3, 4)


def flatten_alpha(pixels: np.ndarray) -> np.ndarray:
    """Pictures on a white ground.

    Args:
        pixels: (..., H, W, 4) uint8, red, green, blue and alpha, not premultiplied.
    Returns:
        (..., H, W, 3) uint8, rounded as PIL does when it pastes.
    """
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(colours)
    return on_white(pixels)


def to_rgb(image: Image.Image, argument: str) -> Image.Image:
    """A PIL image of any mode, upright and on white, in mode RGB.

    Args:
        argument: where it was given, for messages.
    Raises:
        ValueError: a mode that PIL cannot convert, or values of mode I or F that are not from 0 to 255.
    """
    with contextlib.suppress(SyntaxError, struct.error, TypeError, ValueError):  # broken EXIF data tells nothing
        image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        values = torch.from_numpy(np.array(image)).float()
        check_values(values, f"{argument}` of mode `{image.mode}")
        return Image.fromarray(values.round().byte().numpy()).convert("RGB")
    try:
        if {"A", "a"} & set(image.getbands()) or transparent is not None:
            image = image.convert("LA") if image.mode == "La" else image
            return Image.fromarray(flatten_alpha(np.asarray(image.convert("RGBA"))))
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"`{argument}`: an image of mode {image.mode} cannot be shown in RGB: {error}") from error


def read_picture(picture: Any, *, argument: str, data_format: Any = None, white: float = WHITE) -> torch.Tensor:
    """One picture as the model sees it, before it is resized.

    Args:
        picture: a path or another reference to an image; a PIL image; or an array (H, W), (H, W, C) or (C, H, W).
        argument: where it was given, for messages.
        data_format: of arrays, "channels_first" or "channels_last"; found out if None.
        white: value of white in arrays of floats.
    Returns:
        (3, H, W), uint8, or float32 where an array of floats was given (to be passed to `check_values`).
    Raises:
        ValueError: it cannot be read, or is not a picture.
    """
    if is_reference(picture):
        picture = _open_image(picture, argument)
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(to_rgb(picture, argument))).permute(2, 0, 1)
    array = as_array(picture)
    if array is None:
        raise ValueError(f"`{argument}` holds a {type(picture).__name__}, which is not an image, a path or an array")
    if array.ndim == 2:
        array, data_format = array[None], ChannelDimension.FIRST
    if array.ndim != 3:
        raise ValueError(f"`{argument}` holds a picture of shape {tuple(array.shape)}, which must be (H, W, C)")
    return to_rgb_frames(array[None], argument=argument, data_format=data_format, white=white)[0]


def to_rgb_frames(
    array: np.ndarray | torch.Tensor, *, argument: str, data_format: Any = None, white: float = WHITE
) -> torch.Tensor:
    """Frames of an array, with 1 to 4 channels, as (T, 3, H, W); else as `read_picture`."""
    frames = _to_tensor(array, argument)
    shape = tuple(frames.shape)
    if frames.ndim != 4 or 0 in shape:
        raise ValueError(f"`{argument}`: frames must be (T, H, W, C) or (T, C, H, W) and not empty, got shape {shape}")
    if data_format is None:
        first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
        if first == last:
            raise ValueError(
                f"`{argument}`: cannot tell the channels (1 to 4) of shape {shape}; pass `input_data_format`"
            )
        data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    if ChannelDimension(data_format) == ChannelDimension.LAST:
        frames = frames.permute(0, 3, 1, 2)
    if frames.shape[1] not in _CHANNELS:
        raise ValueError(f"`{argument}`: pictures must have 1 to 4 channels, got {frames.shape[1]} in shape {shape}")
    if frames.shape[1] in (2, 4):
        colours, alpha = frames[:, :-1].expand(-1, 3, -1, -1), frames[:, -1:]
        if frames.dtype != torch.uint8:
            alpha = alpha / white
            return colours * alpha + (1 - alpha) * white
        pixels = torch.cat([colours, alpha], 1).permute(0, 2, 3, 1)
        return torch.from_numpy(flatten_alpha(pixels.cpu().numpy())).permute(0, 3, 1, 2).to(frames.device)
    return frames.expand(-1, 3, -1, -1)


def check_values(frames: torch.Tensor, argument: str, white: float = WHITE) -> None:
    """Raise a ValueError unless the values of float pictures can be those of pixels from 0 to 255.

    Args:
        frames: (..., H, W) of any type.
        white: another value than 255 says that the caller scales pixels by another factor, of which nothing is known.
    """
    if not frames.is_floating_point():
        return
    low, high = frames.min().item(), frames.max().item()
    what = f"`{argument}` holds values from {low:g} to {high:g}"
    if not np.isfinite(low + high):
        raise ValueError(f"{what}, which are not all numbers")
    if white != WHITE:
        return
    if low < 0 or high > WHITE:
        raise ValueError(f"{what}; pixels have values from 0 to 255")
    if high <= 1 and bool(((frames > 0) & (frames < 1)).any()):
        raise ValueError(f"{what}, and would be divided by 255; give values from 0 to 255, or `do_rescale=False`")
    if 0 < high <= 1:
        logger.warning_once(
            f"{what} only, and they are divided by 255 all the same. Give values from 0 to 255, or `do_rescale=False`."
        )


def as_array(value: Any) -> np.ndarray | torch.Tensor | None:
    """What follows one of the protocols of arrays; None if nothing does. Tensors keep their device."""
    if isinstance(value, torch.Tensor):
        return value if type(value) is torch.Tensor else value.as_subclass(torch.Tensor)
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (str, bytes, Image.Image, np.generic)):
        return None
    if callable(getattr(value, "asnumpy", None)):  # decord
        return value.asnumpy()
    if hasattr(value, "__array__"):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    if isinstance(getattr(value, "data", None), torch.Tensor) and hasattr(value, "pts_seconds"):  # torchcodec
        return value.data
    return None


def flatten_images(images: Any) -> Iterator[Any]:
    """Single images out of whatever nesting; an array of four or more dimensions holds several."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten_images(image)
        return
    array = as_array(images)
    if array is not None and array.ndim > 3:
        for image in array:
            yield from flatten_images(image)
    else:
        yield images


def _to_tensor(array: np.ndarray | torch.Tensor, argument: str) -> torch.Tensor:
    """uint8 or float32, sharing memory where it can."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise ValueError(f"`{argument}` must hold numbers, got an array of dtype {array.dtype}")
        if array.dtype.kind == "f":
            array = array.astype(np.float32, copy=False)
        elif array.dtype.kind in "ui" and array.dtype != np.uint8:
            _check_integers(array, argument)
            array = array.astype(np.uint8)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # torch takes neither
        array = torch.from_numpy(array)
    if array.is_complex() or array.is_quantized or array.layout != torch.strided:
        raise ValueError(f"`{argument}` must hold numbers, got a tensor of {array.dtype}, {array.layout}")
    if array.is_floating_point():
        return array.to(torch.float32)
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.dtype != torch.uint8:
        _check_integers(array.to(torch.int64), argument)
    return array.to(torch.uint8)


def _check_integers(array: np.ndarray | torch.Tensor, argument: str) -> None:
    low, high = (int(array.min()), int(array.max())) if 0 not in array.shape else (0, 0)
    if low < 0 or high > 255:
        raise ValueError(
            f"`{argument}` holds values from {low} to {high}; pixels have values from 0 to 255, whatever their type"
        )


def _open_image(reference: Any, argument: str) -> Image.Image:
    source = resolve_source(reference, argument=argument, kind="image")
    if source.path is not None and not os.path.isfile(source.path):
        raise ValueError(f"`{argument}`: image {source.name} cannot be read: there is no such file")
    try:
        with Image.open(source.readable) as opened:
            opened.load()
            return opened
    except UnidentifiedImageError as error:  # whose message is about a Python object
        raise ValueError(f"`{argument}`: image {source.name} cannot be read: not of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"`{argument}`: image {source.name} cannot be read: {error}") from error
