"""Other public implementations of Native Sparse Attention, called the way their own code calls them.

None of their code is here. `--peers DIR` names a folder into which they were put by hand:

    DIR/fsa/            github.com/Relaxed-System-Lab/Flash-Sparse-Attention (holds fsa/ and nsa_ref/)
    DIR/xunhaolai/      github.com/XunhaoLai/native-sparse-attention-triton (holds native_sparse_attention/)
    DIR/mdy666/         github.com/mdy666/Scalable-Flash-Native-Sparse-Attention (holds flash_nsa/)
    DIR/fla/            flash-linear-attention, if it is not installed (holds fla/)

Their compression uses the same pooled blocks, but they force the first and the previous block into the selection as
well. Their window branch is taken through flex attention, because they call flash-attn for it.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("fla", "fsa", "xunhaolai", "mdy666")


def is_available(name: str, folder: Path | None) -> bool:
    if folder is not None and (folder / name).is_dir():
        return True
    return name == "fla" and importlib.util.find_spec("fla") is not None


def build(name: str, folder: Path | None, nsa: dict[str, int], device: torch.device) -> Callable:
    """f(q, k, v, g_cmp, g_slc, g_swa) -> o, for packed q, k and v of one sequence."""
    if folder is not None and (folder / name).is_dir():
        sys.path.insert(0, str(folder / name))
    return {"fla": _fla, "fsa": _fsa, "xunhaolai": _xunhaolai, "mdy666": _mdy666}[name](nsa, device)


def _window(nsa: dict[str, int], device: torch.device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, masks = torch.compile(flex_attention, dynamic=False), {}

    def in_window(batch, head, query, key):
        return (query >= key) & (query - key < nsa["window_size"])

    def function(q, k, v):
        tokens = q.shape[0]
        if tokens not in masks:
            masks[tokens] = create_block_mask(in_window, None, None, tokens, tokens, device=device, _compile=True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=masks[tokens], enable_gqa=True)[0].transpose(0, 1)

    return function


def _gated(o_cmp, o_slc, o_swa, gates):
    return sum(o * gate[..., None] for o, gate in zip((o_cmp, o_slc, o_swa), gates, strict=True))


def _boundaries(q: Tensor) -> Tensor:
    return torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)


def _fla(nsa: dict[str, int], device: torch.device) -> Callable:
    from fla.ops.nsa.parallel import parallel_nsa

    window = _window(nsa, device)

    def padded(x: Tensor, group_size: int, padded_size: int) -> Tensor:
        """Heads of a group padded with zeros to a power of two of at least 16, which it requires."""
        x = x.unflatten(1, (-1, group_size))
        padding = (0, 0) * (x.dim() - 3) + (0, padded_size - group_size)
        return torch.nn.functional.pad(x, padding).flatten(1, 2)[None]

    def function(q, k, v, *gates):
        group_size = q.shape[1] // k.shape[1]
        size = max(16, 1 << (group_size - 1).bit_length())
        o = parallel_nsa(
            padded(q, group_size, size), k[None], v[None],
            g_cmp=padded(gates[0], group_size, size), g_slc=padded(gates[1], group_size, size),
            block_counts=nsa["block_counts"], block_size=nsa["block_size"], window_size=0,
        )  # fmt: skip
        o = o[0].unflatten(1, (-1, size))[:, :, :group_size].flatten(1, 2)
        return o + window(q, k, v) * gates[2][..., None]

    return function


def _compressing(compressed_attention: Callable, pool: Callable, select: Callable, nsa: dict, device) -> Callable:
    """fsa and xunhaolai: one set of entry points."""
    window, size, counts = _window(nsa, device), nsa["block_size"], nsa["block_counts"]

    def function(q, k, v, *gates):
        boundaries, tokens = _boundaries(q), q.shape[0]
        k_cmp, cmp_boundaries = pool(k, None, boundaries, size, size)
        v_cmp, _ = pool(v, None, boundaries, size, size)
        o_cmp, indices = compressed_attention(
            q, k_cmp, v_cmp, size, size, size, counts, boundaries, cmp_boundaries.int(), tokens, tokens // size,
            None, 1, 2, parallel_topk_compute=tokens <= 32768,
        )  # fmt: skip
        return _gated(o_cmp, select(q, k, v, indices, size, boundaries, None), window(q, k, v), gates)

    return function


def _fsa(nsa: dict[str, int], device: torch.device) -> Callable:
    from fsa.ops import FSA_topk_sparse_attention
    from nsa_ref.ops import avgpool_compress, compressed_attention

    return _compressing(compressed_attention, avgpool_compress, FSA_topk_sparse_attention, nsa, device)


def _xunhaolai(nsa: dict[str, int], device: torch.device) -> Callable:
    from native_sparse_attention.ops.triton.compressed_attention import compressed_attention
    from native_sparse_attention.ops.triton.topk_sparse_attention import topk_sparse_attention
    from native_sparse_attention.ops.triton.weighted_pool import avgpool_compress

    return _compressing(compressed_attention, avgpool_compress, topk_sparse_attention, nsa, device)


def _mdy666(nsa: dict[str, int], device: torch.device) -> Callable:
    from flash_nsa import compress_attn, mean_pooling, select_attn, slc_topk_indices
    from flash_nsa.utils import NSAHelper

    size = nsa["block_size"]
    NSAHelper.set_hyperparameters(
        kernel_size=size, stride=size, block_size=size, window_size=nsa["window_size"], top_n=nsa["block_counts"],
        num_init_blocks=1, num_local_blocks=2,
    )  # fmt: skip
    window = _window(nsa, device)

    def function(q, k, v, *gates):
        scale = q.shape[2] ** -0.5
        NSAHelper.init_cu_seqlens(_boundaries(q))
        k_cmp, v_cmp = mean_pooling(k), mean_pooling(v)
        o_cmp, lse = compress_attn(q, k_cmp, v_cmp, sm_scale=scale)
        indices, _ = slc_topk_indices(q, k_cmp, lse, sm_scale=scale)
        return _gated(o_cmp, select_attn(q, k, v, indices, sm_scale=scale), window(q, k, v), gates)

    return function
