"""A tiny random checkpoint in the shape of Qwen2.5-VL: config, weights, tokenizer and processor.

It stands in for the published checkpoints where none can be downloaded, as in the tests. The weights are random, so its
answers are noise; everything else (files, key layout, chat format, special tokens) is as in
`Qwen/Qwen2.5-VL-7B-Instruct`.

    python checkpoints/tiny_random.py OUTPUT_FOLDER
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

ROOT = Path(__file__).resolve().parent.parent

# The order fixes the token ids: 256 bytes first, then these, as Qwen2.5-VL appends them to its vocabulary.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def tiny_tokenizer() -> Qwen2TokenizerFast:
    """A Qwen2 tokenizer whose vocabulary is the 256 bytes and Qwen2.5-VL's special tokens: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return as_qwen2_tokenizer(backend)


def as_qwen2_tokenizer(backend: Tokenizer) -> Qwen2TokenizerFast:
    """A byte-level BPE with Qwen2.5-VL's special tokens after its own."""
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=131072,
        padding_side="left",
    )


def tiny_config(tokenizer: Qwen2TokenizerFast, **text_overrides) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL configuration with 2 decoder layers of hidden size 64 and a vision tower of depth 2."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    } | text_overrides
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def random_qwen2_5_vl(config, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A model of transformers with random weights in float32.

    transformers' initialisation (std 0.02, zero biases) leaves every attention pattern flat; wider weights make
    attention errors visible in the logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def save_tiny_qwen2_5_vl(
    folder: str | Path,
    *,
    seed: int = 0,
    layout: str = "new",
    tie_word_embeddings: bool = False,
    max_shard_size: str = "5GB",
    **text_overrides,
) -> Path:
    """Write a complete tiny Qwen2.5-VL checkpoint.

    Args:
        folder: where to; created, and overwritten file by file.
        seed: of the random weights.
        layout: "new" is what transformers 5 saves (`model.language_model.*`, `model.visual.*`), "old" the key names
            of the checkpoints on the Hub (`model.*`, `visual.*`).
        tie_word_embeddings: leave `lm_head.weight` out, as the 3B checkpoint does.
        max_shard_size: as in `save_pretrained`; ignored by the "old" layout, which writes one file.
        text_overrides: fields of the text configuration, such as `num_attention_heads`.
    Raises:
        ValueError: unknown layout.
    """
    if layout not in ("new", "old"):
        raise ValueError(f'`layout` must be "new" or "old", got {layout!r}')
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, **text_overrides)
    config.tie_word_embeddings = tie_word_embeddings
    model = random_qwen2_5_vl(config, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    # save_pretrained writes published key names back where a checkpoint was loaded from them; a fresh model saves new.
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
    if layout == "old":
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        tensors = {_old_key(key): tensor.contiguous() for key, tensor in model.state_dict().items()}
        if tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    template = (ROOT / "chat_template.jinja").read_text()
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=50176),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(min_pixels=56 * 56, max_pixels=50176),
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def _old_key(key: str) -> str:
    """`model.language_model.x` -> `model.x`, `model.visual.x` -> `visual.x`."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen2.5-VL checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(save_tiny_qwen2_5_vl(arguments.folder, seed=arguments.seed))
