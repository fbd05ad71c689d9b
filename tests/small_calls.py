"""Every Triton kernel once, on inputs so small that a memory checker gets through them: run by `test_gpu.py`.

compute-sanitizer python tests/small_calls.py
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from triton_testing import DEVICE  # noqa: E402

from nsa_kernels import attention, triton_rows, utils  # noqa: E402


def main() -> None:
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()

    settings = {"block_size": 16, "block_counts": 2, "window_size": 20, "backend": "triton"}
    for heads, head_dim in (((7, 1), 32), ((10, 2), 96)) if DEVICE.type == "cuda" else (((7, 1), 32),):
        # A sequence of blocks and a remainder, one shorter than a block, one whose queries are its last tokens.
        lengths = utils.SequenceLengths.from_lengths([71, 3, 9], [71, 3, 50], device=DEVICE)
        q, k, v = leaf(83, heads[0], head_dim), *(leaf(124, heads[1], head_dim) for _ in range(2))
        gates = [leaf(83, heads[0]).detach().sigmoid().requires_grad_() for _ in range(3)]
        attention.nsa_attention(q, k, v, *gates, lengths, **settings).sum().backward()
        positions = torch.tensor([2, 3, 60, 123], device=DEVICE)
        triton_rows.text_rows_attention(q[:4], k, v, positions=positions).sum().backward()
        for tensor in (q, k, v, *gates):
            if not tensor.grad.isfinite().all():
                raise SystemExit("a gradient is not finite")
    print("small calls: done")


if __name__ == "__main__":
    main()
