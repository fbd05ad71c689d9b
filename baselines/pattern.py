"""Which pairs of query and key each head takes: what a method says, and all that an executor needs to know."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """What one head takes of the keys before some queries: a block of them, or those that take every key.

    Attributes:
        rows: which of the call's queries, a slice or numbers.
        keys: (num_keys,), int64: positions, first those that every query of the block takes, then the others.
        num_whole: how many of the keys every query takes.
        mask: (num_rows, num_keys - num_whole), bool: which query takes which of the others.
        pooled: by number of keys that make one, the blocks of which the queries take these means.
        num_means: of all of these.
    """

    rows: slice | Tensor
    keys: Tensor
    num_whole: int
    mask: Tensor
    pooled: dict[int, Tensor] = field(default_factory=dict)
    num_means: int = 0

    @property
    def pairs(self) -> int:
        return len(self.mask) * (self.num_whole + self.num_means) + int(self.mask.sum())


@dataclass(frozen=True)
class Pattern:
    """Pairs of one sample, of queries at its end and all of its keys.

    Head h takes query position q and key position k where k <= q, and k = q or the block of both, the row q, the column
    k or the diagonal q - k is listed for h, or q's block of queries meets k on a slash that is. (Every query takes its
    own key, so that none is left without.) Blocks of queries lie on the same grid as blocks of keys: block i has the
    positions from i * block_size on, and of the first block of queries, those before `start` are missing.

    Attributes:
        num_heads: of the queries.
        start: position of the first query; the keys before it come from a cache.
        length: keys; the queries have the positions from start to length - 1.
        block_size: positions per block.
        blocks: (num_heads, num_query_blocks, num_key_blocks), bool, or None.
        rows: (num_heads, length - start), bool: queries that take every key up to theirs; or None.
        columns: (num_heads, length), bool, or None.
        diagonals: (num_heads, length), bool, by q - k; or None.
        slashes: the same, of which a block of queries takes what any of them meets, as kernels compute diagonals: by
            blocks. A diagonal that is alone among others would cost a block product for one pair in block_size.
        pooled: (num_heads, num_query_blocks, num_key_blocks), uint8: of blocks before the queries' own, how many
            neighbouring keys, and values, are taken as their mean, with the logarithm of the number added to its logit;
            0 for none of this. Means count as one key; blocks of them are not listed in `blocks`.
        slash_counts: (num_heads, length + 1): how many slashes are listed below each number; or None.
    Raises:
        ValueError: a shape or type is another one, or there are no queries.
    """

    num_heads: int
    start: int
    length: int
    block_size: int
    blocks: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    diagonals: Tensor | None = None
    slashes: Tensor | None = None
    pooled: Tensor | None = None
    slash_counts: Tensor | None = field(init=False, default=None, repr=False)

    def __post_init__(self):
        if not 0 <= self.start < self.length:
            raise ValueError(f"`start` = {self.start!r} must be a position before `length` = {self.length!r}")
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {self.block_size!r}")
        shapes = {
            "blocks": (self.num_query_blocks, self.num_key_blocks),
            "rows": (self.length - self.start,),
            "columns": (self.length,),
            "diagonals": (self.length,),
            "slashes": (self.length,),
        }
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is None:
                continue
            if given.dtype != torch.bool or given.shape != (self.num_heads, *shape):
                raise ValueError(
                    f"`{name}` must be bool of shape {(self.num_heads, *shape)}, got {given.dtype} {tuple(given.shape)}"
                )

        if self.pooled is not None:
            shape = self.num_heads, self.num_query_blocks, self.num_key_blocks
            if self.pooled.shape != shape or self.pooled.dtype != torch.uint8:
                given = f"{self.pooled.dtype} {tuple(self.pooled.shape)}"
                raise ValueError(f"`pooled` must be uint8 of shape {shape}, got {given}")
            if self.rows is not None:
                raise ValueError("`pooled` and `rows` exclude each other: a row takes keys, not means")
            if any(self.block_size % size for size in self.pooled.unique().tolist() if size):
                raise ValueError(f"`pooled` must divide `block_size` = {self.block_size}, got {self.pooled.unique()}")
        if self.slashes is not None:
            object.__setattr__(self, "slash_counts", torch.nn.functional.pad(self.slashes.cumsum(-1), (1, 0)))

    @property
    def num_key_blocks(self) -> int:
        return -(-self.length // self.block_size)

    @property
    def first_query_block(self) -> int:
        """On the grid of key blocks."""
        return self.start // self.block_size

    @property
    def num_query_blocks(self) -> int:
        return self.num_key_blocks - self.first_query_block

    @property
    def dense_pairs(self) -> int:
        """Of dense causal attention, all heads."""
        return self.num_heads * (self.length * (self.length + 1) - self.start * (self.start + 1)) // 2

    def contains(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether pairs are taken, element by element; for positions in range, of any shapes that broadcast.

        Without means.
        """
        # Indexed with tensors only, and of positions that are clamped, not tested: flex attention compiles this.
        taken = query == key
        if self.blocks is not None:
            block = query // self.block_size - self.first_query_block
            taken = taken | self.blocks[head, block, key // self.block_size]
        if self.rows is not None:
            taken = taken | self.rows[head, query - self.start]
        if self.columns is not None:
            taken = taken | self.columns[head, key]
        if self.diagonals is not None:
            taken = taken | self.diagonals[head, (query - key).clamp(min=0)]
        if self.slashes is not None:
            first = query // self.block_size * self.block_size
            end = (first + self.block_size).clamp(max=self.length)
            counts = self.slash_counts
            met = (
                counts[head, (end - key).clamp(min=0)] - counts[head, (first.clamp(min=self.start) - key).clamp(min=0)]
            )
            taken = taken | (met > 0)
        return taken & (key <= query)

    def to(self, device: torch.device | str) -> "Pattern":
        values = {own.name: getattr(self, own.name) for own in fields(self) if own.init}
        return Pattern(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()})

    def tiles(self, head: int) -> Iterator[Tile]:
        """What this head takes, block of queries by block of queries; of a pattern on the CPU.

        Queries that take every key come together at the end: one of them would have its block meet all keys.
        """
        positions = torch.arange(self.length)
        # How many diagonals below each number are listed, for what a whole block of queries sees of each key.
        counts = None
        if self.diagonals is not None:
            counts = torch.nn.functional.pad(self.diagonals[head].cumsum(0), (1, 0))
        for block in range(self.num_query_blocks):
            tile = self._tile(head, block, positions, counts)
            if len(tile.mask):
                yield tile
        if self.rows is not None and self.rows[head].any():
            for rows in self.rows[head].nonzero()[:, 0].split(self.block_size):
                queries = self.start + rows
                first, end = int(queries[0]), int(queries[-1]) + 1
                yield Tile(rows, positions[:end], first, positions[first:end] <= queries[:, None])

    def _tile(self, head: int, block: int, positions: Tensor, counts: Tensor | None) -> Tile:
        """Of the queries of a block that do not take every key."""
        first = max(self.start, (self.first_query_block + block) * self.block_size)
        end = min(self.length, (self.first_query_block + block + 1) * self.block_size)
        rows, queries = slice(first - self.start, end - self.start), positions[first:end]
        if self.rows is not None and self.rows[head, rows].any():
            rows = (~self.rows[head, rows]).nonzero()[:, 0] + first - self.start
            queries = positions[self.start + rows]
        whole = torch.zeros(end, dtype=torch.bool)
        touched = torch.zeros(end, dtype=torch.bool)
        if self.blocks is not None:
            whole |= self.blocks[head, block].repeat_interleave(self.block_size)[:end]
        if self.columns is not None:
            whole |= self.columns[head, :end]
        if counts is not None:
            # A key k meets these queries on the diagonals first - k to end - 1 - k.
            found = counts[end - positions[:end]] - counts[(first - positions[:end]).clamp(min=0)]
            touched |= found > 0
            whole |= found == end - first
        if self.slashes is not None:
            met = self.slash_counts[head]
            whole |= met[end - positions[:end]] > met[(first - positions[:end]).clamp(min=0)]
        in_whole = whole.clone()
        whole[first:] = False  # of these, causality leaves to each query its own share
        touched[first:] = True  # each query takes its own key
        touched &= ~whole
        keys, others, queries = positions[:end][whole], positions[:end][touched], queries[:, None]
        mask = in_whole[others][None] | (queries == others)
        if counts is not None:
            mask = mask | self.diagonals[head][(queries - others).clamp(min=0)]
        mask = mask & (others <= queries)
        pooled, num_means = {}, 0
        if self.pooled is not None:
            sizes = self.pooled[head, block, : first // self.block_size]
            for size in sizes[sizes > 0].unique().tolist():
                pooled[size] = (sizes == size).nonzero()[:, 0]
                num_means += len(pooled[size]) * self.block_size // size
        return Tile(rows, torch.cat([keys, others]), len(keys), mask, pooled, num_means)

    def count(self) -> int:
        """Pairs that are taken, all heads."""
        pattern = self.to("cpu")
        return sum(tile.pairs for head in range(self.num_heads) for tile in pattern.tiles(head))
