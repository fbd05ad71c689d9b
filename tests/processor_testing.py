"""What the tests of the processor and of the reader share: a processor, and videos whose pictures tell their number."""

from pathlib import Path

import numpy as np
import torch
from tiny_random import tiny_tokenizer
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from files_videonsa import FileClip
from processing_videonsa import VideoNSAProcessor
from synthetic.drawing import write_video

ROOT = Path(__file__).resolve().parent.parent
BITS = 8


def build_processor(**options) -> VideoNSAProcessor:
    return VideoNSAProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=50176),
        tiny_tokenizer(),
        Qwen2VLVideoProcessor(),
        chat_template=(ROOT / "chat_template.jinja").read_text(),
        **options,
    )


def numbered(number: int, height: int = 56, width: int = 224) -> np.ndarray:
    """A picture whose vertical bars spell `number` in binary, so that every decoded frame tells which it is."""
    bars = [255 * (number >> bit & 1) for bit in range(BITS)]
    row = np.repeat(bars, width // BITS).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def numbers(frames: torch.Tensor) -> list[int]:
    """The numbers in (T, 3, H, W) pictures."""
    columns = frames.float().mean(dim=(1, 2)).reshape(len(frames), BITS, -1).mean(dim=2)
    return [sum(int(column > 127) << bit for bit, column in enumerate(row)) for row in columns.tolist()]


def numbered_video(path: Path, count: int = 50, fps: int = 25, **kwargs) -> Path:
    return write_video(path, (numbered(i) for i in range(count)), fps, **kwargs)


def read(processor, path, **options) -> tuple[list[int], object]:
    """The numbers of the frames that the processor takes from a file, and its plan."""
    plan = processor.plan_video(path, **options)
    return numbers(FileClip(path, False).read(plan, lambda frames, plan: frames)), plan


def message(*parts, text: str = "What happens?") -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def apply(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **kwargs
    )
