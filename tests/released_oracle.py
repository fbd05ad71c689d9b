"""The released variant written down plainly, sharing nothing with nsa_kernels: one padded head or token at a time.

Autograd does the gradients. The numbers in comments are those of the list in released_videonsa.py.
"""

import torch
from torch import Tensor

# 4. The 28 heads twice, then 8 heads of zeros.
PADDED_HEADS = [*range(28), *range(28), *[None] * 8]


def oracle(q, k, v, gate_logits, vision_mask, block_size, block_counts, window_size) -> Tensor:
    """q (T, 28, D), k and v (T, 4, D), gate_logits (T, 28, 3), vision_mask (T,) -> (T, 28, D)."""
    is_vision = vision_mask[:, None, None].to(q.dtype)
    gates = (gate_logits * is_vision).sigmoid()  # 3. one half for text
    zeroed = q * is_vision, k * is_vision, v * is_vision
    return oracle_nsa(*zeroed, gates, block_size, block_counts, window_size) + oracle_dense(q * (1 - is_vision), k, v)


def oracle_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """2. Causal attention over all tokens."""
    causal = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return torch.stack([_attend(q[:, h], k[:, h // 7], v[:, h // 7], causal)[0] for h in range(28)], dim=1)


def oracle_nsa(q, k, v, gates, block_size, block_counts, window_size) -> Tensor:
    tokens = len(q)
    t, own = torch.arange(tokens), torch.arange(tokens) // block_size
    k_cmp, v_cmp = (torch.stack([block.mean(0) for block in x.split(block_size)]) for x in (k, v))
    own_and_later = torch.arange(len(k_cmp)) >= own[:, None]  # 5.
    window = (t <= t[:, None]) & (t > t[:, None] - window_size)
    blocks = oracle_blocks(q, k, block_size, block_counts)
    output = torch.zeros_like(q)
    for p, h in enumerate(PADDED_HEADS[:56]):
        kv = p // 16
        chosen = torch.stack([(own == block[:, None]).any(0) for block in blocks[:, kv]]) & (t <= t[:, None])
        o_cmp = _attend(q[:, h], k_cmp[:, kv], v_cmp[:, kv], own_and_later)[0]
        o_slc = _attend(q[:, h], k[:, kv], v[:, kv], chosen)[0]
        o_swa = _attend(q[:, h], k[:, kv], v[:, kv], window)[0]
        gated = sum(gates[:, h, i, None] * o for i, o in enumerate((o_cmp, o_slc, o_swa)))
        output = output + torch.nn.functional.one_hot(torch.tensor(h), 28)[:, None] * gated[:, None] / 2
    return output


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@torch.no_grad()
def oracle_blocks(q: Tensor, k: Tensor, block_size: int, block_counts: int) -> Tensor:
    """6. (T, 4, S) of q and k whose text is zero already."""
    tokens, _, head_dim = q.shape
    k_cmp = torch.stack([block.mean(0) for block in k.split(block_size)])
    own = torch.arange(tokens) // block_size
    own_and_later = torch.arange(len(k_cmp)) >= own[:, None]
    heads = [q[:, h] if h is not None else torch.zeros_like(q[:, 0]) for h in PADDED_HEADS]
    lse = [_attend(x, k_cmp[:, p // 16], k_cmp[:, p // 16], own_and_later)[1] for p, x in enumerate(heads)]
    lse = torch.stack(lse).flatten()  # written head by head, and read token by token
    num_chosen = 1
    while num_chosen < block_counts:
        num_chosen *= 2
    rows = []
    for t in range(tokens):
        before = k_cmp[: own[t]]
        for kv in range(4):
            total = torch.zeros(int(own[t]), dtype=q.dtype)
            for p in range(16 * kv, 16 * kv + 16):
                total = total + (before[:, kv] @ heads[p][t] * head_dim**-0.5 - lse[64 * t + p]).exp()
            importance = [*total.tolist(), 16.0] + [0.0] * (len(k_cmp) - int(own[t]) - 1)
            rows.append(sort_network(importance, int(own[t]), block_size)[:num_chosen])
    return torch.tensor(rows).view(tokens, 4, num_chosen)


def sort_network(importance: list[float], own: int, width: int) -> list[int]:
    """The blocks up to `own` in the order in which the published kernel's network leaves them, -1 for no block."""
    best = None
    for start in range(0, own + 1, width):
        run = [(importance[c], c if c <= own else -1) if c < len(importance) else (0.0, -1)
               for c in range(start, start + width)]  # fmt: skip
        stage = 2
        while stage < width:
            _merge(run, stage, lambda i, stage=stage: bool(i & stage))
            stage *= 2
        if best is not None:
            _merge(run, width, lambda i: False)
            run = best[: width // 2] + run[width // 2 :]
        _merge(run, width, lambda i: True)
        best = run
    return [block for _, block in best]


def _merge(run: list[tuple[float, int]], size: int, is_down) -> None:
    """Compare and exchange over strides size / 2, ..., 1. Where sorting goes down, equal values are exchanged too."""
    stride = size // 2
    while stride:
        for i in range(len(run)):
            if not i & stride and (run[i][0] > run[i + stride][0]) != is_down(i):
                run[i], run[i + stride] = run[i + stride], run[i]
        stride //= 2
