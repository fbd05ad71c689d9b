"""Training data and a checkpoint for tests: drawn videos with questions, and a tiny model whose gates matter."""

import json
from pathlib import Path

import torch
from tiny_random import save_tiny_qwen2_5_vl

from convert_weights import convert
from modeling_videonsa import VideoNSAForConditionalGeneration
from training.draw_data import draw_records


def write_videos(folder: Path, seconds: list[int]) -> list[dict]:
    """Draw videos of that many seconds, at 4 pictures a second and 4 tokens for two of them.

    Returns:
        A LLaVA-Video record for each, of two questions.
    """
    folder.mkdir(parents=True)
    return [as_conversations(record) for record in draw_records(folder, seconds)]


def as_conversations(record: dict) -> dict:
    """A chat record as LLaVA-Video has it."""
    first, *_ = record["messages"][0]["content"]
    turns = []
    for message in record["messages"]:
        text = message["content"] if message["role"] == "assistant" else message["content"][-1]["text"]
        turns.append({"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": text})
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"scene-{int(record['id'])}", "video": first["video"], "conversations": turns}


def as_messages(record: dict) -> dict:
    """The reverse."""
    messages = []
    for turn in record["conversations"]:
        content = [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}]
        if turn["value"].startswith("<image>"):
            content.insert(0, {"type": "video", "video": record["video"]})
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": content})
    return {"id": record["id"], "messages": messages}


def write_records(path: Path, records: list[dict]) -> Path:
    """A list for `.json`, lines for `.jsonl`."""
    lines = [json.dumps(record) for record in records]
    path.write_text(f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines))
    return path


def make_checkpoint(folder: Path, **text_config) -> Path:
    """A converted tiny checkpoint with small blocks and gates that differ."""
    convert(save_tiny_qwen2_5_vl(folder / "qwen", **text_config), folder / "VideoNSA")
    config = {"block_size": 4, "block_counts": 2, "window_size": 5}
    model = VideoNSAForConditionalGeneration.from_pretrained(folder / "VideoNSA", **config)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in model.model.language_model.layers:
            for gate in (layer.self_attn.g_proj_1, layer.self_attn.g_proj_2):
                torch.nn.init.normal_(gate.weight, std=gate.in_features**-0.5)
    model.save_pretrained(folder / "VideoNSA")
    return folder / "VideoNSA"
