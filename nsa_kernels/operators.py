"""The attention as opaque operators, which is how torch.compile and torch.export see it.

The functions of this folder loop on the host over sequences, heads and chunks, and read numbers that only the host has.
Traced, that is a graph of thousands of nodes that fits one prompt. So each of them calls an operator from here while a
compiler is looking: one node, with a fake implementation that knows nothing but shapes. Outside of compiled code,
nothing goes through here: there the same functions run under autograd itself, where tools that count operations see
them, and what autograd keeps for backward need not be computed again.

Of `nsa_attention` the operator returns what backward needs. The others (text rows, the released variant, a branch by
itself, the oracles) compute themselves again in backward, as under gradient checkpointing: their forward is made of
several autograd functions, torch's own attention among them, whose memory an operator cannot return.

A process may load this folder several times, from several checkpoints and revisions. The operators of each copy have
a namespace of their own (`NAMESPACE`), so that none replaces another's.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.library import custom_op

from . import utils


def _namespace() -> str:
    """Named after the package and its code, so that it means the same to compilers' caches in every process."""
    digest = hashlib.sha256(__name__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"videonsa_{digest.hexdigest()[:12]}"


NAMESPACE = _namespace()


def define(name: str, schema: str, function: Callable, fake: Callable) -> Callable:
    """Register an operator without a gradient.

    Args:
        name: of the operator; a number is appended where it is taken, by code that was loaded a second time.
        schema: `(Tensor x, int n) -> Tensor`, every argument positional.
        function: what it computes, without autograd and without autocast; it returns new tensors.
        fake: the same on tensors without data.
    """
    registered, unique, number = getattr(torch.ops, NAMESPACE), name, 1
    while hasattr(registered, unique):
        number += 1
        unique = f"{name}_{number}"

    def run(*args):
        device = next(x.device for x in args if isinstance(x, Tensor))
        with utils.no_autocast(device):
            return function(*args)

    # What runs depends on numbers that the host reads: no CUDA graph may replay it.
    tags = (torch.Tag.cudagraph_unsafe,)
    operator = custom_op(f"{NAMESPACE}::{unique}", run, mutates_args=(), schema=schema, tags=tags)
    operator.register_fake(fake)
    return operator


def define_differentiable(
    name: str,
    arguments: str,
    returns: str,
    function: Callable,
    fake: Callable,
    num_inputs: int,
    backward: Callable | None = None,
) -> Callable:
    """Register an operator with a gradient, that of its first result; the backward operator has none.

    Args:
        arguments, returns: of the schema; the first num_inputs arguments are the tensors that get a gradient.
        function, fake: as in `define`.
        backward: (do, saved, *arguments) -> gradients, where saved are the results after the first. By default, they
            are computed from `function`, which is run again under autograd.
    """

    def recompute(do, _, *args):
        return vjp(lambda *x: function(*x, *args[num_inputs:]), args[:num_inputs], do)

    gradients = backward or recompute
    operator = define(name, f"({arguments}) -> {returns}", function, fake)
    backward_operator = define(
        f"{name}_backward",
        f"(Tensor do, Tensor[] saved, {arguments}) -> Tensor[]",
        lambda *args: [x.contiguous() for x in gradients(*args)],
        lambda do, saved, *args: [like(x) for x in args[:num_inputs]],
    )

    def setup_context(ctx, inputs, output):
        saved = output[1:] if isinstance(output, tuple) else ()
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        saved = saved if backward else ()
        ctx.num_saved = len(saved)
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.save_for_backward(*saved, *[x for x in inputs if isinstance(x, Tensor)])

    def differentiate(ctx, do, *_):
        if do is None:
            return (None,) * len(ctx.others)
        saved, tensors = ctx.saved_tensors[: ctx.num_saved], iter(ctx.saved_tensors[ctx.num_saved :])
        args = [next(tensors) if other is None else other[0] for other in ctx.others]
        return *backward_operator(do, list(saved), *args), *[None] * (len(args) - num_inputs)

    operator.register_autograd(differentiate, setup_context=setup_context)
    return operator


def vjp(function: Callable, inputs: Sequence[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """Gradients of function(*inputs), or of its first result, for its gradient do; inside an operator."""
    # Below autograd, where operators run, grad mode alone does not bring it back.
    keys = torch._C.DispatchKey
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    exclude = exclude.remove(keys.AutogradFunctionality).remove(keys.ADInplaceOrView)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(output, inputs, do, allow_unused=True, materialize_grads=True)


def like(x: Tensor) -> Tensor:
    """Memory like that of x, contiguous: operators promise it of what they return."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def records_grad(*tensors: Tensor) -> bool:
    """Whether autograd will want the gradient of a function of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# The public functions of a branch have these in common.
BRANCH_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"


def boundaries(cu_seqlens_q: Tensor | utils.SequenceLengths, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Either form of the public arguments as two tensors, unread."""
    if isinstance(cu_seqlens_q, utils.SequenceLengths):
        return cu_seqlens_q.cu_seqlens_q, cu_seqlens_q.cu_seqlens_k
    return cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k


def fake_branch(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    """o and lse of a branch."""
    return like(q), q.new_empty(q.shape[:2], dtype=utils.accumulate_dtype(q.dtype))
