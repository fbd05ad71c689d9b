"""Train the small VideoNSA in `checkpoints/tiny/` from nothing, on a CPU.

    python checkpoints/make_tiny.py checkpoints/tiny --overwrite

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
import tempfile
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
from conversion.staging import staged  # noqa: E402
from modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402
from synthetic.scenes import COLOURS, DIGITS, DIRECTIONS, MAJORITY_SHAPES, make_scene  # noqa: E402


@dataclass
class Settings:
    """How the checkpoint is trained.

    Attributes:
        seed: of weights, scenes and pictures.
        processes: that share the cards and conversations of a step, each with one thread.
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
    processes: int = 2
    nsa_mode: str = "sparse"
    vision_steps: int = 1000
    note_steps: int = 400
    answer_steps: int = 5000
    cards: int = 128
    conversations: int = 10
    questions: int = 8
    learning_rate: float = 2e-3
    block_size: int = 16
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
    """Write the checkpoint in bfloat16, with its processor."""
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


def link_code(folder: Path) -> None:
    """Inside this repository, the code of a checkpoint becomes links to the repository's, which never grow old."""
    if folder.resolve().is_relative_to(ROOT):
        for path in sorted(folder.iterdir()):
            if path.suffix == ".py" or path.is_dir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.symlink_to(os.path.relpath(ROOT / path.name, folder.resolve()))


def train(rank: int, settings: Settings, output: Path, rendezvous: Path) -> None:
    """One of the processes; the first one saves."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=settings.processes
    )
    start = time.perf_counter()
    torch.manual_seed(settings.seed)  # the same weights everywhere
    rng = np.random.default_rng([settings.seed, 1 + rank])
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings)
    train_vision_tower(model, rng, settings)
    train_to_answer(model, tokenizer, rng, settings)
    torch.distributed.destroy_process_group()
    if rank == 0:
        save(model, tokenizer, output)
        minutes = (time.perf_counter() - start) / 60
        record = asdict(settings) | {"minutes": round(minutes, 1), "torch": torch.__version__, "cpus": os.cpu_count()}
        (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def parse_arguments() -> tuple[Settings, Path, bool]:
    """Settings, the folder to write, and whether to replace it."""
    parser = argparse.ArgumentParser(description="Train a small VideoNSA on drawn videos.")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    for field in fields(Settings):
        flag, choices = "--" + field.name.replace("_", "-"), ("sparse", "dense") if field.name == "nsa_mode" else None
        parser.add_argument(flag, type=field.type, default=field.default, choices=choices)
    arguments = vars(parser.parse_args())
    output, overwrite = arguments.pop("output"), arguments.pop("overwrite")
    for name, value in arguments.items():
        least = 0 if name == "seed" else 1
        if name == "learning_rate" and not 0 < value < 1:
            parser.error(f"--learning-rate must be between 0 and 1, got {value}")
        if isinstance(value, int) and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    processes = arguments["processes"]
    for name in ("cards", "conversations"):
        if arguments[name] % processes:
            parser.error(f"--{name} must be a multiple of --processes ({processes}), got {arguments[name]}")
    return Settings(**arguments), output, overwrite


def main() -> None:
    """The command line."""
    settings, output, overwrite = parse_arguments()
    with staged(output, overwrite) as staging, tempfile.TemporaryDirectory() as folder:
        arguments = (settings, staging.folder, Path(folder) / "rendezvous")
        torch.multiprocessing.spawn(train, arguments, settings.processes)
    link_code(output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"make_tiny.py: error: {error}") from error
