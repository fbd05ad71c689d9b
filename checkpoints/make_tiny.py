"""Train the small VideoNSA in `checkpoints/tiny/` from nothing, on a CPU.

    python checkpoints/make_tiny.py checkpoints/tiny

It answers the questions of `synthetic/scenes.py` about drawn videos. `tiny_training.py` says how it learns, this file
what it is: its tokenizer, its sizes, its folder. The settings decide everything: the same ones on the same kind of
machine give the same weights.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny_random import as_qwen2_tokenizer  # noqa: E402
from tiny_training import SIZE, train_to_answer, train_vision_tower  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor  # noqa: E402

from configuration_videonsa import VideoNSAConfig  # noqa: E402
from modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402
from synthetic.scenes import COLOURS, DIGITS, DIRECTIONS, MAJORITY_SHAPES, make_scene  # noqa: E402


@dataclass
class Settings:
    """How the checkpoint is trained.

    Attributes:
        seed: of weights, scenes and pictures.
        threads: of torch.
        nsa_mode: "sparse", or "dense" for the same model with Qwen2.5-VL's attention.
        vision_steps: of the first stage, which trains the vision tower on single cards.
        note_steps: of the second stage, which teaches video tokens what to take note of.
        answer_steps: of the third stage, in which the whole model but the vision tower learns to answer.
        cards: per step of the first stage.
        conversations: per step of the later stages, each about one video.
        questions: per conversation.
        learning_rate: of all stages.
        block_size, block_counts, window_size: of the attention. A second of video is four tokens.
    """

    seed: int = 0
    threads: int = 1
    nsa_mode: str = "sparse"
    vision_steps: int = 1000
    note_steps: int = 400
    answer_steps: int = 5000
    cards: int = 128
    conversations: int = 10
    questions: int = 8
    learning_rate: float = 2e-3
    block_size: int = 8
    block_counts: int = 2
    window_size: int = 8


def build_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE of 400 tokens or so, in which every answer is one token."""
    rng = np.random.default_rng(0)
    texts = [question.text for _ in range(300) for question in make_scene(rng, 32).questions()]
    texts += [
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
        *COLOURS,
        *DIGITS,
        *DIRECTIONS,
        *MAJORITY_SHAPES,
    ] * 50
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    )
    return as_qwen2_tokenizer(backend)


def build_model(tokenizer: Qwen2TokenizerFast, settings: Settings) -> VideoNSAForConditionalGeneration:
    """A random model of 1.4 million parameters with four decoder layers."""
    token_id = tokenizer.convert_tokens_to_ids
    hidden_size = 128
    config = VideoNSAConfig(
        text_config={
            "vocab_size": 8 * math.ceil(len(tokenizer) / 8),
            "hidden_size": hidden_size,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            # Time gets the fast half of the frequencies: pictures of four tokens need little of height and width.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "nsa_mode": settings.nsa_mode,
            "block_size": settings.block_size,
            "block_counts": settings.block_counts,
            "window_size": settings.window_size,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return VideoNSAForConditionalGeneration(config)


def save(model: VideoNSAForConditionalGeneration, tokenizer: Qwen2TokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with its processor. Inside this repository, its code becomes links."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    area = {"min_pixels": SIZE * SIZE, "max_pixels": SIZE * SIZE}
    VideoNSAProcessor(
        image_processor=Qwen2VLImageProcessor(**area),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**area),
        chat_template=(ROOT / "chat_template.jinja").read_text(),
        max_pixels_per_frame=SIZE * SIZE,
    ).save_pretrained(folder)
    if folder.resolve().is_relative_to(ROOT):
        for path in sorted(folder.iterdir()):
            if path.suffix == ".py" or path.is_dir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.symlink_to(os.path.relpath(ROOT / path.name, folder.resolve()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small VideoNSA on drawn videos.")
    parser.add_argument("output", type=Path, help="folder to write")
    for field in fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    settings = Settings(**arguments)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    start = time.perf_counter()

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings)
    train_vision_tower(model, rng, settings)
    train_to_answer(model, tokenizer, rng, settings)
    save(model, tokenizer, output)
    minutes = (time.perf_counter() - start) / 60
    record = asdict(settings) | {"minutes": round(minutes, 1), "torch": torch.__version__, "cpus": os.cpu_count()}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
