"""Bytes that the model's wiring copies in each decoder layer, round the attention: gathered, put, filled, joined.

    python benchmarks/copied_bytes.py [--tokens 131072] [--output benchmarks/results/<date>_copied_bytes.json]

Counted on tensors without data, of the 7B's shape in bfloat16: what operators write that only move numbers (`MOVES`),
forward and backward. A prompt of one video and no padding has its vision tokens side by side and takes slices; the
same prompt with index tensors, as padded prompts and those of several videos have, is what each layer copied before
there were slices. The attention itself is left out.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from published_sizes import published_config
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layer_videonsa import place_rows, text_calls, text_inputs, vision_inputs
from routing_videonsa import VisionRouting

TEXT = 64
"""Text tokens on either side of the video."""
MOVES = (
    "index", "index_put", "index_put_", "_index_put_impl_", "cat", "clone", "copy_", "_to_copy",
    "new_zeros", "zeros", "slice_backward", "select_backward",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Adds up the bytes that `MOVES` write, by operator."""

    def __init__(self):
        super().__init__()
        self.written: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in MOVES:
            moved = args[2] if name.startswith(("index_put", "_index_put")) else result  # of a target, what is put
            self.written[name] = self.written.get(name, 0) + moved.numel() * moved.element_size()
        return result


def indexed(routing: VisionRouting, tokens: int) -> VisionRouting:
    """The same with index tensors in the place of slices."""
    columns = torch.arange(TEXT, tokens - TEXT)
    index = torch.zeros_like(columns), columns
    return replace(routing, vision_rows=index, vision_keys=index)


def copied(routing: VisionRouting, tokens: int, backward: bool) -> dict[str, int]:
    """Bytes by operator."""
    fields = published_config("7B")
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    head_dim = fields["hidden_size"] // heads
    query, key, value = (
        torch.empty(1, count, tokens, head_dim, dtype=torch.bfloat16, device="meta", requires_grad=backward)
        for count in (heads, kv_heads, kv_heads)
    )
    gates = torch.empty(tokens - 2 * TEXT, heads, 3, dtype=torch.bfloat16, device="meta")
    with Counter() as counter:
        q, k, v, *_ = vision_inputs(query, key, value, gates, routing)
        # In the place of the attention, something that needs all of them and moves nothing.
        vision = q * (k.sum() + v.sum())
        text = []
        for call in text_calls(routing, "sdpa", "torch", query.device):
            rows, keys, values = text_inputs(query, key, value, call)
            text.append(rows.transpose(0, 1) * (keys.sum() + values.sum()))
        output = place_rows(query, vision, text, routing)
        if backward:
            output.backward(torch.empty_like(output))
    return counter.written


def measure(tokens: int) -> dict:
    """tokens; for slices and index tensors, bytes of a layer forward, and forward and backward, by operator.

    Raises:
        ValueError: there is no room for a video between the text.
    """
    if tokens <= 2 * TEXT:
        raise ValueError(f"`tokens` must be more than {2 * TEXT}, got {tokens}")
    types = torch.zeros(1, tokens, dtype=torch.long)
    types[:, TEXT : tokens - TEXT] = 2
    slices = VisionRouting.build(types, None, 0)
    result: dict = {"tokens": tokens}
    for name, routing in (("slices", slices), ("index tensors", indexed(slices, tokens))):
        result[name] = {}
        for kind, backward in (("forward", False), ("forward and backward", True)):
            by_operator = copied(routing, tokens, backward)
            result[name][kind] = {"bytes": sum(by_operator.values()), "by_operator": by_operator}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result = measure(arguments.tokens)
    print(f"{arguments.tokens:,} tokens, GB copied in a layer of the 7B, bfloat16")
    for name in ("index tensors", "slices"):
        parts = (f"{kind} {result[name][kind]['bytes'] / 1e9:.2f}" for kind in ("forward", "forward and backward"))
        print(f"{name:14} {', '.join(parts)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
