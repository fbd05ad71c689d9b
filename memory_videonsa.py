"""Bytes that reading a video takes, by arithmetic."""

from dataclasses import dataclass


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


def estimate_memory(model, tokens: int, *, chunk_tokens: int) -> MemoryEstimate:
    text = model.config.text_config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    head_dim = text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * model.dtype.itemsize * tokens
    return MemoryEstimate(weights, cache, 0)
