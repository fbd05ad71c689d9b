"""What the sparse prefill methods have in common: options with checks, and one function that chooses pairs."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .pattern import Pattern


@dataclass(frozen=True)
class SparsePrefill:
    """A training-free choice of the pairs of a prompt's attention; decoding steps are dense.

    Subclasses are dataclasses whose fields are the method's options.

    Attributes:
        name: of the attention implementation.
        source: paper, with the place in it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    block_size: int

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        """Choose the pairs of one sample.

        Where the keys are more than the queries, the others are in a cache: the queries are a later part of the prompt,
        and what a method reads off "the last queries" is read off the last ones of that part.

        Args:
            query: (num_heads, num_queries, head_dim).
            key: (num_kv_heads, length, head_dim).
            layer: number of the decoder layer.
        """
        raise NotImplementedError

    def _pattern(self, query: Tensor, key: Tensor, **lists: Tensor) -> Pattern:
        """A `Pattern` of these shapes."""
        length = key.shape[1]
        return Pattern(query.shape[0], length - query.shape[1], length, self.block_size, **lists)

    def __post_init__(self):
        self._check_integer("block_size", 1)

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` of {self.name} must be an integer from {least} on, got {value!r}")

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` of {self.name} must be a number from 0 to 1, got {value!r}")


def build(method_class: type, options: dict):
    """A method with these options.

    Raises:
        ValueError: an option that the method does not have, or one out of its range.
    """
    known = [field.name for field in dataclasses.fields(method_class) if field.init]
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; it has {', '.join(known)}"
            raise ValueError(f"`{name}` = {value!r} is no option of {method_class.name}{hint}")
    return method_class(**options)
