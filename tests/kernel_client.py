"""What test_hub_kernel runs in fresh processes: `python kernel_client.py SOURCE OUTPUT`, a folder or a Hub id."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def compute(nsa_attention) -> dict[str, torch.Tensor]:
    """An output and a gradient, of two sequences."""
    torch.manual_seed(0)
    q, (k, v), gates = torch.randn(90, 6, 16), torch.randn(2, 90, 2, 16), torch.rand(3, 90, 6)
    inputs = [x.requires_grad_() for x in (q, k.clone(), v.clone(), *gates.unbind())]
    lengths = torch.tensor([0, 30, 90], dtype=torch.int32)
    o = nsa_attention(*inputs, lengths, block_size=4, block_counts=3, window_size=5)
    return {"o": o.detach(), "dq": torch.autograd.grad(o.square().sum(), inputs)[0]}


def main() -> None:
    from kernels import get_kernel, get_local_kernel  # not in the environment of the tests

    source, output = sys.argv[1:]
    if Path(source).is_dir():
        kernel = get_local_kernel(Path(source), backend="cpu")
    else:
        kernel = get_kernel(source, version=1, backend="cpu", trust_remote_code=True)
    assert "nsa_kernels" not in sys.modules and "transformers" not in sys.modules
    assert set(kernel.__all__) <= set(dir(kernel))
    save_file(compute(kernel.nsa_attention), output)


if __name__ == "__main__":
    main()
