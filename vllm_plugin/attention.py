"""The attention of a decoder layer in vLLM: one operator, which sends vision rows through NSA and text rows to vLLM.

The operator is opaque to vLLM's compiler, which splits graphs at it (`settings.py`). What it has to know of a step is
built once, before the layers run (`model.py`), and lies in vLLM's forward context; a step without vision tokens has
nothing there, and is vLLM's own dense attention.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .internals import (
    ColumnParallelLinear,
    ReplicatedLinear,
    direct_register_custom_op,
    get_attention_context,
    get_forward_context,
    subclass_attention_backend,
    unified_attention_with_output,
    unified_kv_cache_update,
)
from .routing import Routing
from .videonsa import nsa_attention

STEP = "videonsa"


@dataclass
class Counters:
    """What this process has computed so far, counted once for each layer of a step.

    Attributes:
        dense: vLLM's own attention, of steps without new vision tokens.
        sparse: NSA.
        cached: of the sparse ones, those that read vision keys of earlier steps from the cache.
    """

    dense: int = 0
    sparse: int = 0
    cached: int = 0


COUNTERS = Counters()


@dataclass
class Step:
    """A step with new vision tokens.

    Attributes:
        routing: of its rows.
        text_metadata: vLLM's metadata of the text runs as requests of their own; `None` where there are none.
        num_layers: how many layers have seen it.
    """

    routing: Routing
    text_metadata: Any
    num_layers: int = 0

    @classmethod
    def build(cls, routing: Routing, metadata: Any) -> "Step":
        """From the metadata of the whole step, which a `remembering` backend built."""
        text = None
        if routing.text_runs:
            build, common = metadata.videonsa
            text = build(of_text_runs(common, routing))
        return cls(routing, text)


def of_text_runs(common: Any, routing: Routing) -> Any:
    """vLLM's `CommonAttentionMetadata` of a step in which every run of text rows is a request, and nothing else is."""
    device = common.block_table_tensor.device
    requests, num_rows, num_keys = (
        torch.tensor(values, dtype=torch.int32)
        for values in zip(*((run.request, run.num_rows, run.num_keys) for run in routing.text_runs), strict=True)
    )
    starts = nn.functional.pad(num_rows.cumsum(0), (1, 0)).to(torch.int32)
    return replace(
        common,
        query_start_loc=starts.to(device, non_blocking=True),
        query_start_loc_cpu=starts,
        seq_lens=num_keys.to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=num_keys,
        num_reqs=len(num_rows),
        num_actual_tokens=len(routing.text_rows),
        max_query_len=int(num_rows.max()),
        max_seq_len=int(num_keys.max()),
        block_table_tensor=common.block_table_tensor[requests.long().to(device, non_blocking=True)],
        slot_mapping=common.slot_mapping[routing.text_rows],
        # Of the requests as they were; no backend that is served here needs them.
        is_prefilling=None,
        positions=None,
        req_idx=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@functools.cache
def remembering(backend: type) -> type:
    """An attention backend whose metadata remember what they were built from and how, as `metadata.videonsa`."""
    parent = backend.get_builder_cls()

    class RememberingBuilder(parent):
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.videonsa = functools.partial(super().build, 0), common_attn_metadata
            return metadata

    return subclass_attention_backend("VideoNSA_", backend, RememberingBuilder)


def read_cpu_cache(kv_cache: torch.Tensor, slots: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, (slots, num_kv_heads, head_dim) each, of (blocks, num_kv_heads, block_size, 2 * head_dim).

    The first half of a block has the keys, transposed, the second half the values.
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    block, offset = slots // block_size, slots % block_size
    halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, head_dim)
    keys, values = halves.chunk(2, dim=2)
    keys = keys.reshape(num_blocks, num_kv_heads, head_dim, block_size)
    return keys[block, :, :, offset], values[block, :, offset]


def read_flash_cache(kv_cache: torch.Tensor, slots: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where every slot has its key and its value side by side."""
    block_size = kv_cache.shape[2]
    pairs = kv_cache.transpose(1, 2)[slots // block_size, slots % block_size]  # [slots, num_kv_heads, 2 * head_dim]
    return pairs.split(head_dim, dim=-1)


# Attention backends of vLLM, and how their caches are read. FLASH_ATTN was never run: `check_reading` would tell.
CACHE_READERS = {"CPU_ATTN": read_cpu_cache, "FLASH_ATTN": read_flash_cache}


def check_reading(name: str, read: torch.Tensor, written: torch.Tensor) -> None:
    """Raise a RuntimeError unless vision keys or values come back from the cache as they were written."""
    if not torch.equal(read, written):
        raise RuntimeError(
            f"vLLM's attention backend {name} lays its cache out in a way that VideoNSA does not know: what is read is "
            "not what was written. On a CPU with AMX, use --dtype float32 or float16"
        )


def attend(
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """The attention of one layer, written into `output`.

    Args:
        hidden_states: (rows, hidden_size), after the layer's norm: what gates are made of.
        query, output: (rows, num_heads, head_dim); key, value: (rows, num_kv_heads, head_dim). Heads of this rank.
        layer_name: of vLLM's attention layer.
    """
    if not get_forward_context().attn_metadata:  # vLLM measures memory, without a cache
        output.zero_()
        return
    unified_kv_cache_update(key, value, layer_name)
    step = get_forward_context().additional_kwargs.get(STEP)
    if step is None:
        COUNTERS.dense += 1
        unified_attention_with_output(query, key, value, output, layer_name)
        return
    COUNTERS.sparse += 1
    step.num_layers += 1
    _, layer, kv_cache, _ = get_attention_context(layer_name)
    routing, rows = step.routing, step.routing.text_rows
    if step.text_metadata is not None:
        text = torch.empty_like(output[: len(rows)])
        layer.impl.forward(layer, query[rows], key[rows], value[rows], kv_cache, step.text_metadata, output=text)
        output[rows] = text
    rows = routing.vision_rows
    keys, values = key[rows], value[rows]
    if routing.vision_slots is not None:
        COUNTERS.cached += 1
        keys, values = layer.videonsa.read_cache(kv_cache, routing, keys, values)
    output[rows] = layer.videonsa.attend_vision(hidden_states[rows], query[rows], keys, values, routing)


def _attend_fake(
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    return


direct_register_custom_op(op_name="videonsa_attention", op_func=attend, mutates_args=["output"], fake_impl=_attend_fake)


class VideoNSAAttention(nn.Module):
    """vLLM's attention of Qwen2.5-VL with gates: its parts under their names, and two projections more.

    Args:
        dense: vLLM's `Qwen2Attention`, whose parts are taken over.
        config: VideoNSA's text configuration.
        prefix: of the names of its weights.
    Raises:
        ValueError: vLLM has chosen an attention backend whose cache is not known.
    """

    def __init__(self, dense: nn.Module, config: Any, prefix: str):
        super().__init__()
        self.qkv_proj, self.o_proj = dense.qkv_proj, dense.o_proj
        self.rotary_emb, self.attn = dense.rotary_emb, dense.attn
        self.head_dim, self.scaling, self.config = dense.head_dim, dense.scaling, config
        self.sizes = [dense.q_size, dense.kv_size, dense.kv_size]
        self.g_proj_1 = ReplicatedLinear(config.hidden_size, config.hidden_size, prefix=f"{prefix}.g_proj_1")
        # Three numbers for each head, ordered by head: ranks get those of their heads.
        self.g_proj_2 = ColumnParallelLinear(config.hidden_size, 3 * dense.total_num_heads, prefix=f"{prefix}.g_proj_2")
        backend = self.attn.attn_backend
        self.backend = backend.get_name()
        if self.backend not in CACHE_READERS or backend.forward_includes_kv_cache_update:
            raise ValueError(
                f"VideoNSA cannot be served with vLLM's attention backend {self.backend}; "
                f"--attention-backend takes {', '.join(CACHE_READERS)}"
            )
        self.attn.attn_backend = remembering(backend)
        self.was_read = False
        # Not as a module, which this one is a part of.
        self.attn.__dict__["videonsa"] = self

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions: (3, rows); hidden_states: (rows, hidden_size), and so is the result."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        query, key, value = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        torch.ops.vllm.videonsa_attention(hidden_states, query, key, value, output, self.attn.layer_name)
        return self.o_proj(output.flatten(1))[0]

    def read_cache(
        self, kv_cache: torch.Tensor, routing: Routing, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `routing.vision_slots`, (total_k, num_kv_heads, head_dim); the new ones are among them."""
        keys, values = CACHE_READERS[self.backend](kv_cache, routing.vision_slots, self.head_dim)
        if not self.was_read:  # once: on a GPU, looking at it waits
            ends = zip(routing.lengths.offsets_q[1:], routing.lengths.offsets_k[1:], strict=True)
            for first, (end_q, end_k) in zip(routing.lengths.offsets_q, ends, strict=False):
                for read, written in ((keys, new_keys), (values, new_values)):
                    check_reading(self.backend, read[end_k - (end_q - first) : end_k], written[first:end_q])
            self.was_read = True
        return keys, values

    def attend_vision(
        self,
        hidden_states: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        routing: Routing,
    ) -> torch.Tensor:
        """NSA of vision rows: (total_q, hidden_size), (total_q, num_heads, head_dim) and (total_k, num_kv_heads,
        head_dim) give (total_q, num_heads, head_dim)."""
        hidden = nn.functional.gelu(self.g_proj_1(hidden_states)[0])
        logits = self.g_proj_2(hidden)[0].unflatten(-1, (-1, 3)) / self.config.gate_temperature
        return nsa_attention(
            query,
            keys,
            values,
            *torch.sigmoid(logits).unbind(-1),
            routing.lengths,
            block_size=self.config.block_size,
            block_counts=self.config.block_counts,
            window_size=self.config.window_size,
            softmax_scale=self.scaling,
            backend=self.config.nsa_backend,
        )
