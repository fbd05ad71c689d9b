"""A key-value cache with room to grow: written in place, so that a long context is neither copied nor doubled.

transformers' `DynamicCache` makes new tensors of everything for each token. For a cache of an hour of video (6 GB for
a 7B model) that is the larger part of a decoding step, and twice the memory while a reading answers a question. Here,
keys and values lie in buffers, of which the layers show the part that is filled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, DynamicLayer

_GROWTH = 1.25
SPARE_TOKENS = 1024
"""Room that a reading's cache has for a question and its answer."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, (1, num_kv_heads, length, head_dim), in buffers that may be longer.

    Args:
        capacity: tokens that the buffers hold at first; they grow beyond it by a quarter at a time.
    """

    def __init__(self, capacity: int = 0):
        self.capacity, self.length = capacity, 0
        self._buffers: dict[str, torch.Tensor | None] = {}
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._filled("keys")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._set("keys", value)

    @property
    def values(self) -> torch.Tensor | None:
        return self._filled("values")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._set("values", value)

    def _filled(self, name: str) -> torch.Tensor | None:
        buffer = self._buffers.get(name)
        return buffer if buffer is None else buffer[..., : self.length, :]

    def _set(self, name: str, value: torch.Tensor | None) -> None:
        # A dict of its own for each state: `restored_after` keeps the one before.
        self._buffers = self._buffers | {name: value}
        self.length = 0 if value is None or value.ndim < 4 else value.shape[-2]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        length = self.length + key_states.shape[-2]
        for name, states in (("keys", key_states), ("values", value_states)):
            buffer = self._buffers.get(name)
            if buffer is None or buffer.ndim < 4 or length > buffer.shape[-2]:
                self._grow(name, states, length)
            self._buffers[name][..., self.length : length, :] = states
        self.length = length
        return self.keys, self.values

    def _grow(self, name: str, states: torch.Tensor, length: int) -> None:
        room = length if length == self.length or not self.length else int(_GROWTH * length)
        room = max(self.capacity, room)
        with torch.inference_mode(False):  # tensors of inference mode could not be written to outside of it
            shape = *states.shape[:-2], room, states.shape[-1]
            buffer = torch.empty(shape, dtype=states.dtype, device=states.device)
        if self.length:
            buffer[..., : self.length, :] = self._filled(name)
        self._buffers = self._buffers | {name: buffer}

    def reserve(self, capacity: int) -> None:
        """Make buffers of this capacity, or longer where they are filled further, in the place of these."""
        self.capacity = capacity
        for name in ("keys", "values"):
            if (states := self._filled(name)) is not None and self._buffers[name].shape[-2] != capacity:
                self._grow(name, states, self.length)

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers: a negative number of tokens, which go from the end."""
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` = {tokens_to_remove} must be negative")
        self.length = max(0, self.length + tokens_to_remove)


class PastLayer(DynamicLayer):
    """What a layer held when it had `length` entries, for tokens that it holds already to be run once more.

    Nothing is copied or written: what these tokens bring is what follows in the layer.
    """

    def __init__(self, layer: DynamicLayer, length: int):
        super().__init__()
        self._whole, self._length = layer, length
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._length

    def update(self, key_states, value_states, *args, **kwargs):
        self._length += key_states.shape[-2]
        return tuple(states[..., : self._length, :] for states in (self._whole.keys, self._whole.values))


class RoomyCache(Cache):
    """A `RoomyLayer` for each decoder layer.

    Args:
        num_layers: decoder layers.
        capacity: as in `RoomyLayer`.
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        super().__init__(layers=[RoomyLayer(capacity) for _ in range(num_layers)])


@contextmanager
def restored_after(cache: Cache) -> Iterator[None]:
    """Inside, what is added to the cache is there; after it, and after an error, the cache is as it was.

    Works for caches whose layers replace their tensors or write behind what they hold, as transformers' dynamic and
    quantised ones and `RoomyCache` do. (Where tensors are replaced, both are in memory inside.)
    """
    state = state_of(cache)
    try:
        yield
    finally:
        restore_(cache, state)


def state_of(cache: Cache) -> tuple[dict, list[dict]]:
    """What `restore_` needs; no tensor is copied."""
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    return own, [dict(vars(layer)) for layer in cache.layers]


def restore_(cache: Cache, state: tuple[dict, list[dict]]) -> None:
    own, layers = state
    for name in vars(cache).keys() - own.keys() - {"layers"}:
        delattr(cache, name)
    vars(cache).update(own)
    del cache.layers[len(layers) :]
    for layer, attributes in zip(cache.layers, layers, strict=True):
        vars(layer).clear()
        vars(layer).update(attributes)
