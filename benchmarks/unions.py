"""How many blocks neighbouring tokens select together: what the cost of selection hangs on (docs/kernel_model.md).

`recording` measures it in whatever runs inside it, for example a model with real weights on a real video:

    with unions.recording() as found:
        model.generate(**inputs)          # nsa_backend="triton"
    print(found)                          # a dictionary per layer and forward call
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

# What one (token, block) pair would cost in a kernel that takes pairs one by one, over what one block costs in the walk
# of a tile: a guess. For blocks of fewer than 1 / 0.15 tokens, about 7, such a kernel would be cheaper.
PAIR_OVER_BLOCK = 0.15


def union_statistics(indices: Tensor, tile: int = 18) -> dict:
    """What tiles of neighbouring tokens select.

    Args:
        indices: (tokens, num_kv_heads, block_counts), int32, -1 for none.
        tile: tokens that share a walk; 18 times 7 heads fill a tile of the selection kernels.
    Returns:
        r: distinct blocks of a tile over the blocks of one of its tokens, between 1 and `tile`.
        blocks_per_tile: distinct blocks of a tile, on average.
        share_by_members: of a tile's blocks, the share that 1, 2, .. `tile` of its tokens selected.
        hybrid_over_union: time of a kernel that takes rare blocks pair by pair over that of the walk, by the model.
    """
    tiles = len(indices) // tile
    if not tiles:
        return {}
    chosen = indices[: tiles * tile].unflatten(0, (tiles, tile)).transpose(1, 2).flatten(2).long()  # [tiles, G, blocks]
    num_blocks = int(chosen.max()) + 1
    by_members = torch.zeros(tile + 1, dtype=torch.long, device=indices.device)
    for part in chosen.split(512):  # the table of all tiles would be large
        counts = torch.zeros(*part.shape[:2], num_blocks + 1, dtype=torch.int32, device=indices.device)
        counts.scatter_add_(-1, part + 1, torch.ones_like(part, dtype=torch.int32))
        by_members += torch.bincount(counts[..., 1:].flatten(), minlength=tile + 1)
    blocks = by_members[1:].cpu()
    members = torch.arange(1, tile + 1)
    total = int(blocks.sum())
    return {
        "r": total * tile / int((blocks * members).sum()),
        "blocks_per_tile": total / (tiles * indices.shape[1]),
        "share_by_members": [round(share, 4) for share in (blocks / total).tolist()],
        "hybrid_over_union": float((blocks * (PAIR_OVER_BLOCK * members).clamp(max=1.0)).sum() / total),
    }


@contextlib.contextmanager
def recording(tile: int = 18) -> Iterator[list[dict]]:
    """Collects `union_statistics` of every choice of blocks by the triton backend."""
    from nsa_kernels import triton_compression

    found, choose = [], triton_compression.choose

    def observed(*args):
        indices = choose(*args)
        found.append(union_statistics(indices, tile))
        return indices

    with mock.patch.object(triton_compression, "choose", observed):
        yield found
