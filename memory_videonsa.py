"""Bytes that reading a video takes, by arithmetic on a model's configuration.

Everything is an upper bound of what is in use at one time; what the process and its allocator take besides is not in
it. `tests/test_memory.py` measures it, and `docs/memory.md` says what the published sizes need.
"""

from dataclasses import dataclass

# Pieces of patches at once, of which a chunk has four (`prompt_videonsa.py`): four wait, one is being encoded, and of
# the one that is made there are the frames in float32, normalised, cut and joined.
_PIECES = 4 + 1 + 4
_FLOAT = 4  # bytes; of patches, and of what the torch backend computes with, whatever the model's dtype
_TILE_BYTES = 4 * _FLOAT << 20  # scores, probabilities and what is gathered for them, 2**20 elements each
_INDEX_BYTES = 16 * 8  # of a token: ids, types, positions, and where the routing finds it
_GROUP = 64  # weights or cache entries that share a scale where they have four bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the weights, of the cache, and of what is worked on besides, at most."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    def __str__(self) -> str:
        return (
            f"about {self.total / 1e9:.2f} GB: {self.weights / 1e9:.2f} of weights, {self.cache / 1e9:.2f} of cache, "
            f"{self.working / 1e9:.2f} of work"
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: of what quantisers take (the decoder's linear layers), and of what is left as it is.

    Attributes:
        decoder: weights of the decoder's linear layers without the gates.
        gates: weights and biases of the gate projections.
        embeddings: of tokens, and the output layer where it is not the same.
        vision: the tower with its merger.
        rest: biases and norms of the decoder.
    """

    decoder: int
    gates: int
    embeddings: int
    vision: int
    rest: int

    @property
    def total(self) -> int:
        return self.decoder + self.gates + self.embeddings + self.vision + self.rest


def count_parameters(config) -> ParameterCounts:
    """Of a model with this `VideoNSAConfig`, which is not built."""
    text, vision = config.text_config, config.vision_config
    hidden, layers, kv_size = text.hidden_size, text.num_hidden_layers, text.num_key_value_heads * _head_dim(text)
    q_size, gates = text.num_attention_heads * _head_dim(text), 3 * text.num_attention_heads
    width, patch = vision.hidden_size, _patch_values(vision)
    merged = width * vision.spatial_merge_size**2
    block = 4 * width * (width + 1) + 3 * width * vision.intermediate_size + 2 * vision.intermediate_size + 3 * width
    merger = width + merged * (merged + 1) + (merged + 1) * vision.out_hidden_size
    return ParameterCounts(
        decoder=layers * (2 * hidden * (q_size + kv_size) + 3 * hidden * text.intermediate_size),
        gates=layers * (hidden + 1) * (hidden + gates),
        embeddings=text.vocab_size * hidden * (1 if config.tie_word_embeddings else 2),
        vision=patch * width + vision.depth * block + merger,
        rest=layers * (q_size + 2 * kv_size + 2 * hidden) + hidden,
    )


def weight_bytes(config, bits: int = 16) -> int:
    """Bytes of the weights.

    Args:
        bits: of a weight in the decoder's linear layers: 16 or 32, or 8 or 4, where gates, embeddings, the vision tower
            and norms stay at 16 (`docs/quantisation.md`). With 4, each 64 weights have a scale of 16 bits.
    """
    counts = count_parameters(config)
    plain = max(bits, 16)
    return (counts.total - counts.decoder) * plain // 8 + round(counts.decoder * _bits_with_scale(bits, 16) / 8)


def cache_bytes(config, tokens: int, bits: int = 16) -> int:
    """Bytes of the keys and values of so many tokens.

    Args:
        bits: of a number, 16 or 32; or 4, where each 64 numbers have a scale and an offset of 16 bits.
    """
    return round(config.text_config.num_hidden_layers * _layer_values(config, tokens) * _bits_with_scale(bits, 32) / 8)


def layer_copy_bytes(config, tokens: int, itemsize: int, is_one_run: bool = True) -> int:
    """Bytes of what one layer's attention copies of the keys and values of so many tokens, in the torch backend.

    The means of the blocks of one key/value head. Of smaller numbers than float32, all of one head in float32. If text
    stands between the vision tokens, theirs of all heads, in the model's dtype, and those of one head.

    Args:
        is_one_run: whether all vision tokens follow each other, as those of one video do.
    """
    one_head = 2 * tokens * _head_dim(config.text_config) * max(_FLOAT, itemsize)
    copied = one_head if itemsize < _FLOAT or not is_one_run else 0
    gathered = 0 if is_one_run else _layer_values(config, tokens) * itemsize
    return gathered + copied + one_head // config.block_size


def chunk_bytes(config, chunk_tokens: int, itemsize: int, step_tokens: int = 0) -> int:
    """Bytes of what is worked on of a chunk, however long the video is: its pixels, the vision tower, one layer.

    Args:
        step_tokens: of two frames, which are not prepared in parts.
    """
    text, vision = config.text_config, config.vision_config
    patches, width = max(chunk_tokens // 4, step_tokens) * vision.spatial_merge_size**2, vision.hidden_size
    values = patches * _patch_values(vision)
    pixels = values * (_PIECES * _FLOAT + 3)  # 3: frames in uint8, decoded, resized, stacked

    attention = 5 * width * itemsize + 4 * width * _FLOAT  # rotated in float32
    tower = patches * (2 * width * itemsize + max(attention, 3 * vision.intermediate_size * itemsize))
    tower += values * itemsize if itemsize != _FLOAT else 0

    heads, hidden = text.num_attention_heads * _head_dim(text), text.hidden_size
    # Of one key/value head: queries, three outputs and their sum, and the outputs of all pairs, in tiles that may
    # be a third empty.
    group = heads // text.num_key_value_heads
    branches = group * _FLOAT * (5 + config.block_counts * 3 / 2)
    attention = itemsize * (8 * heads + 3 * hidden) + branches  # queries and outputs as they come, sorted, put back
    stays = 5 * hidden * itemsize  # embeddings, features that wait, residual, normed
    layer = chunk_tokens * (stays + max(attention, 3 * text.intermediate_size * itemsize))
    return round(pixels + max(tower, layer)) + _TILE_BYTES


def estimate_memory(
    config,
    tokens: int,
    *,
    chunk_tokens: int,
    step_tokens: int = 64,
    is_one_run: bool = True,
    itemsize: int = 2,
    weights: int | None = None,
    cache_bits: int = 0,
) -> MemoryEstimate:
    """What reading takes at most.

    Args:
        config: a `VideoNSAConfig`.
        tokens: that the cache holds at most.
        chunk_tokens: of `model.read`; step_tokens: of two frames; is_one_run: as in `layer_copy_bytes`.
        itemsize: bytes of a number in activations.
        weights: bytes of the weights; by default those of `weight_bytes`.
        cache_bits: of `cache_bytes`; by default those of activations. A quantised cache is unpacked layer by layer.
    """
    weights = weight_bytes(config, 8 * itemsize) if weights is None else weights
    working = chunk_bytes(config, chunk_tokens, itemsize, step_tokens) + tokens * _INDEX_BYTES
    working += layer_copy_bytes(config, tokens, itemsize, is_one_run)
    if cache_bits and cache_bits < 8 * itemsize:
        working += _layer_values(config, tokens) * itemsize
    return MemoryEstimate(weights, cache_bytes(config, tokens, cache_bits or 8 * itemsize), working)


def _head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _patch_values(vision) -> int:
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def _layer_values(config, tokens: int) -> int:
    return 2 * tokens * config.text_config.num_key_value_heads * _head_dim(config.text_config)


def _bits_with_scale(bits: int, scale: int) -> float:
    return bits + scale / _GROUP if bits <= 4 else bits
