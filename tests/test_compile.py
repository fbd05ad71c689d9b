"""torch.compile: one node per attention, the numbers of eager code, no more graphs than Qwen2.5-VL."""

import importlib.util
import logging
import shutil
import sys
from functools import partial

import pytest
import torch
import torch._dynamo
from conftest import ROOT, Prompts, build_config, build_model, build_released, checkpoint_activations, our_nodes
from nsa_cases import Case, with_gradients
from tiny_random import tiny_config, tiny_tokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration
from triton_testing import DEVICE, HAS_TRITON

import layer_videonsa
import released_videonsa
import routing_videonsa
from generation_videonsa import CACHE_NAME
from nsa_kernels import attention, compression, dense, operators, selection, sliding_window, utils

ONE_LAYER = {"num_hidden_layers": 1}
VIDEO = ("video", 4, 4, 8)  # 32 tokens
CASE = Case((5, 0, 28), (11, 0, 28), heads=(7, 1))
RELEASED = Case((40,), heads=(28, 4))
needs_triton_on_cpu = pytest.mark.skipif(not HAS_TRITON or DEVICE.type != "cpu", reason="runs in Triton's interpreter")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def num_nodes(graphs: list[torch.fx.GraphModule]) -> list[int]:
    return [sum(node.op.startswith("call") for node in graph.graph.nodes) for graph in graphs]


def compile_counting(function, backend: str = "eager", **options):
    """The compiled function, and a list that its graphs are put into."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, **options), counter.graphs


# Public functions of nsa_kernels

FUNCTIONS = {
    "nsa_attention": lambda backend: lambda *x: attention.nsa_attention(*x, CASE.lengths, **CASE.nsa, backend=backend),
    "compression_attention": lambda backend: (
        lambda q, k, v, *_: compression.compression_attention(q, k, v, CASE.lengths, block_size=8, backend=backend)[0]
    ),
    "selection_attention": lambda backend: (
        lambda q, k, v, *_: selection.selection_attention(
            q,
            k,
            v,
            compression.select_blocks(q, k, CASE.lengths, block_size=8, block_counts=2),
            CASE.lengths,
            block_size=8,
            backend=backend,
        )[0]
    ),
    "sliding_window_attention": lambda backend: (
        lambda q, k, v, *_: sliding_window.sliding_window_attention(
            q, k, v, CASE.lengths.cu_seqlens_q, CASE.lengths.cu_seqlens_k, window_size=6, backend=backend
        )[0]
    ),
    "text_rows_attention": lambda backend: (
        lambda q, k, v, *_: dense.text_rows_attention(q, k, v, positions=torch.arange(3, 36), backend=backend)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton_on_cpu)])
def test_a_function_is_one_node_with_the_numbers_of_eager_code(name, backend):
    function, inputs = FUNCTIONS[name](backend), [*CASE.qkv(torch.float32), *CASE.gates(torch.float32)]
    compiled, graphs = compile_counting(function, "aot_eager", fullgraph=True)
    expected, actual = with_gradients(function, inputs), with_gradients(compiled, inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    (graph,) = graphs
    assert our_nodes(graph) == ["select_blocks"] * (name == "selection_attention") + [name]


@pytest.mark.parametrize("name", ["reference", "oracle_needs_no_gradient", "released_attention", "block_indices"])
def test_the_other_functions_are_one_node_too(name):
    q, k, v = RELEASED.qkv()
    mask = torch.arange(40) % 7 > 1
    logits = torch.randn(40, 28, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    function = {
        "reference": lambda q, k, v, gates: attention.nsa_attention(
            q, k, v, *gates.sigmoid().unbind(-1), RELEASED.lengths, **RELEASED.nsa, backend="reference"
        ),
        "oracle_needs_no_gradient": lambda q, k, v, gates: (
            gates.sum()
            * sliding_window.sliding_window_attention(
                q.detach(), k.detach(), v.detach(), RELEASED.lengths, backend="reference"
            )[0]
        ),
        "released_attention": lambda q, k, v, gates: released_videonsa.released_attention(
            q, k, v, gates, mask, block_size=8, block_counts=2, window_size=5
        ),
        "block_indices": lambda q, k, v, gates: (
            gates.sum() * released_videonsa.released_block_indices(q, k, mask, block_size=8, block_counts=2)
        ),
    }[name]
    compiled, graphs = compile_counting(function, "aot_eager", fullgraph=True)
    expected, actual = with_gradients(function, [q, k, v, logits]), with_gradients(compiled, [q, k, v, logits])
    for a, e in zip(actual, expected, strict=True):  # sums of gradients may be in another order
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert len(our_nodes(*graphs)) == 1


@pytest.mark.skipif(DEVICE.type != "cpu" or not HAS_TRITON, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("lengths", [(20, 20), (20, 13)], ids=["torch's dense attention", "a window"])
def test_triton_backend_where_every_block_is_selected(lengths):
    """Selection is dense then, through torch's own attention where that takes the sequences in one call."""
    case = Case(lengths, block_size=8, block_counts=3)
    inputs = [*case.qkv(torch.float16), *case.gates(torch.float16)]
    function = partial(attention.nsa_attention, cu_seqlens_q=case.lengths, **case.nsa, backend="triton")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, actual = with_gradients(function, inputs), with_gradients(compiled, inputs)
    assert torch.equal(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        # Autograd rounds the sum of the two parts of a gradient as the operator does, in another order at most.
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(torch.float16).eps, atol=0)


def layer_inputs(heads=(4, 2), requires_grad=True):
    """What a layer hands its operator: two samples, one with padding between its tokens."""
    generator = torch.Generator().manual_seed(0)
    token_types = torch.tensor([[0, 0, *[2] * 20, 0, 0, *[1] * 6, 0], [0, *[2] * 25, 0, 0, 0, 0, 0]])
    mask = torch.ones_like(token_types)
    mask[1, [0, 9, 28]] = 0
    shapes = [(2, heads[0], 31, 8), (2, heads[1], 31, 8), (2, heads[1], 31, 8), (2, 31, heads[0], 3)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[3] = inputs[3].sigmoid()
    plan = routing_videonsa.VisionRouting.build(token_types, mask, 0).plan
    return [x.requires_grad_(requires_grad) for x in inputs], plan


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("save", [True, False])
def test_operators_keep_their_promises(backend, save):
    inputs, plan = layer_inputs(requires_grad=save)
    opcheck(layer_videonsa.attention_operator, (*inputs, plan, 4, 2, 5, None, backend, "sdpa", save))
    packed = [*CASE.qkv(), *CASE.gates()]
    packed = [x.requires_grad_(save) for x in packed]
    boundaries = CASE.lengths.cu_seqlens_q, CASE.lengths.cu_seqlens_k
    opcheck(attention._operator, (*packed, *boundaries, 8, 3, 10, None, backend, save))


def test_operators_without_saved_tensors_keep_their_promises():
    q, k, v = (x.requires_grad_() for x in RELEASED.qkv())
    opcheck(dense._operator, (q[:3], k, v, None, None, "torch"))
    logits = torch.zeros(1, 40, 28, 3, dtype=torch.float64, requires_grad=True)
    plan = torch.stack([torch.arange(40)[None] % 7 > 1, torch.ones(1, 40, dtype=torch.bool)])
    states = [x.transpose(0, 1)[None].detach().requires_grad_() for x in (q, k, v)]
    opcheck(layer_videonsa.released_operator, (*states, logits, plan, 8, 2, 5, None, "torch"))
    types = torch.tensor([[0, 2, 2, 0]])
    opcheck(layer_videonsa._plan_operator, (types, torch.ones_like(types), None, 0))
    positions = torch.arange(4).expand(3, 1, 4) * torch.tensor([1, 1, 2])[:, None, None]
    opcheck(layer_videonsa._released_plan_operator, (positions, None))


def test_gradients_of_a_layer_are_right():
    """Through a numeric derivative: they are put together by hand."""
    inputs, plan = layer_inputs()
    settings = 4, 9, 5, None, "torch", "sdpa", True  # every block is chosen: a choice has no derivative
    scalar = lambda *x: layer_videonsa.attention_operator(*x, plan, *settings)[0]  # noqa: E731
    assert torch.autograd.gradcheck(scalar, inputs, fast_mode=True)


@needs_triton_on_cpu
def test_layer_with_the_triton_backend(monkeypatch):
    """Its kernels give float32, rounded in another order, and take the later text rows of a sample at once."""
    from nsa_kernels import triton_rows

    results, rows = [], []
    attend = triton_rows.text_rows_of_checked
    monkeypatch.setattr(triton_rows, "text_rows_of_checked", lambda q, *a: rows.append(len(q)) or attend(q, *a))
    for backend in ("torch", "triton"):
        inputs, plan = layer_inputs()
        inputs = [x.detach().float().requires_grad_() for x in inputs]
        output, *saved = layer_videonsa.attention_operator(*inputs, plan, 4, 2, 5, None, backend, "sdpa", True)
        assert [len(x) for x in saved] == [2 * 31, 3 if backend == "triton" else 1, 3]
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * e.abs().max().item())
    assert rows == [2 + 1, 2, 2] * 2, "forward and backward; between the tokens of the second sample there is padding"


def test_differentiating_twice_stays_an_error():
    inputs = [x.requires_grad_() for x in (*CASE.qkv(), *CASE.gates())]
    compiled = torch.compile(
        partial(attention.nsa_attention, cu_seqlens_q=CASE.lengths, **CASE.nsa, backend="torch"), backend="eager"
    )
    first = torch.autograd.grad(compiled(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first.sum(), inputs[1])


def test_eager_code_calls_no_operator(model, prompts):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names = []
    with Names():
        model(**prompts.one([5, VIDEO, 7])).logits.sum().backward()
    assert len(names) > 1000
    assert not [name for name in names if name.startswith("videonsa_")]


# Copies of the code

CHANGE = ("    group_size, num_kv_heads = q.shape[1] // k.shape[1], k.shape[1]\n", "    q = 0 * q\n")


def load_copy(folder, package: str, change=("", "")):
    """`nsa_kernels` as the Hub's dynamic modules load it: a copy of the files, under another package."""
    target = folder / package
    shutil.copytree(ROOT / "nsa_kernels", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    source = (ROOT / "nsa_kernels/attention.py").read_text()
    assert change[0] in source
    (target / "attention.py").write_text(source.replace(change[0], change[0] + change[1], 1) if change[0] else source)
    spec = importlib.util.spec_from_file_location(
        package, target / "__init__.py", submodule_search_locations=[str(target)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.attention")


def test_copies_of_the_code_do_not_touch_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    inputs = [*CASE.qkv(), *CASE.gates()]
    copies = [
        load_copy(tmp_path / "1", "first_checkpoint"),
        load_copy(tmp_path / "2", "second_checkpoint", CHANGE),
        load_copy(tmp_path / "3", "third_checkpoint"),
    ]
    functions = [partial(m.nsa_attention, **CASE.nsa, backend="torch") for m in (attention, *copies)]
    boundaries = CASE.lengths.cu_seqlens_q, CASE.lengths.cu_seqlens_k
    expected = [with_gradients(lambda *x, f=f: f(*x, *boundaries), inputs) for f in functions]
    compiled = [torch.compile(lambda *x, f=f: f(*x, *boundaries), backend="aot_eager") for f in functions]
    for index in (0, 1, 2, 3, 1, 0):
        actual = with_gradients(compiled[index], inputs)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected[index], strict=True))
    assert not torch.equal(expected[1][0], expected[2][0]), "the copies compute the same: nothing is tested"
    assert len({m.operators.NAMESPACE for m in (attention, *copies)}) == 4


def test_code_that_is_executed_again_leaves_the_first_alone(tmp_path, monkeypatch):
    """As transformers does with a module whose files have changed: in the same module, under the same name."""
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    inputs, boundaries = [*CASE.qkv(), *CASE.gates()], (CASE.lengths.cu_seqlens_q, CASE.lengths.cu_seqlens_k)
    module = load_copy(tmp_path, "checkpoint")
    old = partial(module.nsa_attention, **CASE.nsa, backend="torch")
    first = old(*inputs, *boundaries)
    old_operator, names = module._operator, set(dir(getattr(torch.ops, module.operators.NAMESPACE)))
    source = (tmp_path / "checkpoint/attention.py").read_text()
    (tmp_path / "checkpoint/attention.py").write_text(source.replace(CHANGE[0], "".join(CHANGE), 1))
    module.__spec__.loader.exec_module(module)
    new = torch.compile(partial(module.nsa_attention, **CASE.nsa, backend="torch"), backend="aot_eager", fullgraph=True)
    second = new(*inputs, *boundaries)
    assert not torch.equal(first, second)
    assert module._operator is not old_operator
    assert not {name for name in names if not hasattr(getattr(torch.ops, module.operators.NAMESPACE), name)}
    # What was there before finds its helpers in the module, as eager functions do.
    assert torch.equal(old_operator(*inputs, *boundaries, 8, 3, 10, None, "torch", False)[0], old(*inputs, *boundaries))


# The model


def compile_text_model(model, backend: str = "eager", **options) -> list:
    """Compile the text model of a model; its graphs are put into the list that is returned."""
    text_model = model.model.language_model
    text_model.forward, graphs = compile_counting(text_model.forward, backend, **options)
    return graphs


def assert_same_results(model, compiled, inputs: dict, tolerance: float) -> None:
    """Logits and gradients; the tolerance is relative to the largest."""
    valid, gradients = inputs["attention_mask"].bool(), []
    logits = [m(**inputs).logits[valid] for m in (model, compiled)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=tolerance * logits[0].abs().max().item())
    for m, output in zip((model, compiled), logits, strict=True):
        m.zero_grad()
        output.square().mean().backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    for name, expected in gradients[0].items():
        if expected is not None:
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance * scale, msg=name)


BUILDS = {
    "paper": build_model,
    "eager attention": partial(build_model, attn_implementation="eager", text=ONE_LAYER),
    "released": partial(build_released, text=ONE_LAYER),
}


@pytest.mark.parametrize("variant", BUILDS)
def test_text_model_is_one_graph_with_the_numbers_of_eager_code(variant, prompts):
    model, compiled = BUILDS[variant](), BUILDS[variant]()
    graphs = compile_text_model(compiled, "aot_eager", fullgraph=True)
    both = prompts.batch([prompts.one([5, VIDEO, 7]), prompts.one([3, ("image", 4, 4), 6, VIDEO, 2], seed=1)])
    assert_same_results(model, compiled, both, 1e-12)  # float64, sums in another order
    is_released, num_layers = variant == "released", len(model.model.language_model.layers)
    expected = ["released_layer_attention" if is_released else "layer_attention"] * num_layers
    assert our_nodes(*graphs) == ["released_plan"] * is_released + expected  # there, the text model makes the plan


def test_inductor(prompts):
    model, compiled = build_model(torch.float32, text=ONE_LAYER), build_model(torch.float32, text=ONE_LAYER)
    compile_text_model(compiled, "inductor", fullgraph=True)
    # float32: fused operations round in another order, over a layer.
    assert_same_results(model, compiled, Prompts(build_config(), torch.float32).one([5, VIDEO, 7]), 1e-5)


MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}


def test_graph_does_not_grow_with_tokens_heads_or_videos(prompts):
    shapes = [
        ({}, [5, VIDEO, 7]),
        ({}, [5, ("video", 8, 8, 8), 7, VIDEO, 3, ("image", 4, 4), 2]),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "rope_parameters": MROPE}, [5, VIDEO, 7]),
    ]
    sizes = []
    for text, layout in shapes:
        torch._dynamo.reset()
        model = build_model(text=ONE_LAYER | text)
        graphs = compile_text_model(model, fullgraph=True)
        with torch.no_grad():
            model(**prompts.one(layout))
        sizes += num_nodes(graphs)
    assert len(set(sizes)) == 1
    assert len(sizes) == 3


def stock_model(**text):
    config = tiny_config(tiny_tokenizer(), **text)
    config._attn_implementation = "sdpa"
    return Qwen2_5_VLForConditionalGeneration(config).double().eval()


LAYOUTS = [[5, VIDEO, 7], [9, ("video", 6, 4, 8), 3], [4, VIDEO, 2, ("video", 2, 4, 8), 5], [3, ("image", 8, 8), 7]]


def test_prompts_of_other_lengths_compile_no_more_often_than_stock(prompts):
    counts = []
    for model in (stock_model(**ONE_LAYER), build_model(text=ONE_LAYER)):
        torch._dynamo.reset()
        graphs = compile_text_model(model, fullgraph=True)
        counts.append([])
        for layout in LAYOUTS:
            with torch.no_grad():
                model(**prompts.one(layout))
            counts[-1].append(len(graphs))
    stock, ours = counts
    assert all(mine <= theirs for mine, theirs in zip(ours, stock, strict=True)), counts


def test_whole_model_has_no_more_graphs_than_stock(prompts):
    counts = []
    for model in (stock_model(**ONE_LAYER), build_model(text=ONE_LAYER)):
        torch._dynamo.reset()
        # Most of the graphs of both would be those of the vision tower, which is the same.
        model.model.visual.forward = torch.compiler.disable(model.model.visual.forward)
        compiled, graphs = compile_counting(model)
        counts.append([])
        for layout in ([30], [41], [5, VIDEO, 7]):
            inputs = prompts.one(layout)
            with torch.no_grad():
                logits = compiled(**inputs).logits
            counts[-1].append(len(graphs))
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-11)
    stock, ours = counts
    assert all(mine <= theirs for mine, theirs in zip(ours, stock, strict=True)), counts
    assert "plan" in [name for graph in graphs for name in our_nodes(graph)], "the prompt was not seen"


def test_text_prompts_of_the_released_variant_are_one_graph(prompts):
    """A look at the tokens would break it; that there are no vision tokens without a grid is checked all the same."""
    model = build_released(text=ONE_LAYER)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        text = prompts.one([30])
        torch.testing.assert_close(compiled(**text).logits, model(**text).logits, rtol=0, atol=1e-11)
        with pytest.raises(ValueError, match="`video_grid_thw` is missing"):
            compiled(**text | {"mm_token_type_ids": 2 * text["attention_mask"]})


@pytest.mark.parametrize("build", [build_model, build_released], ids=["paper", "released"])
def test_a_compiled_model_generates_the_same(build, prompts):
    model = build(text=ONE_LAYER)
    inputs = prompts.batch([prompts.one([5, VIDEO, 7]), prompts.one([9, VIDEO, 2], seed=1)])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    graphs = compile_text_model(model, fullgraph=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    # The prompt, and the first decoding step; the others are of the same kind as the second, which is another length.
    assert 2 <= len(graphs) <= 3
    assert "attention" not in "".join(our_nodes(graphs[1]))


def test_vision_tokens_that_join_a_cache(prompts):
    model, compiled = build_model(text=ONE_LAYER), build_model(text=ONE_LAYER)
    compile_text_model(compiled, fullgraph=True)
    inputs = prompts.one([5, VIDEO, 7, ("video", 2, 4, 8), 3])
    positions = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )[0]
    outputs = []
    for m in (model, compiled):
        cache, embeds = None, m.get_input_embeddings()(inputs["input_ids"])
        with torch.no_grad():
            for part in (slice(0, 20), slice(20, 63)):
                output = m(
                    inputs_embeds=embeds[:, part],
                    position_ids=positions[:, :, part],
                    mm_token_type_ids=inputs["mm_token_type_ids"][:, : part.stop],
                    **{CACHE_NAME: cache},
                    use_cache=True,
                )
                cache = output[CACHE_NAME]
        outputs.append(output.logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)


def test_gradient_checkpointing(prompts):
    model, compiled = build_model(text=ONE_LAYER).train(), build_model(text=ONE_LAYER).train()
    checkpoint_activations(compiled)
    graphs = compile_text_model(compiled, "aot_eager", fullgraph=True)
    # With a cache, transformers warns and so breaks the graph, Qwen2.5-VL's too.
    assert_same_results(model, compiled, prompts.one([5, VIDEO, 7]) | {"use_cache": False}, 1e-12)
    assert len(graphs) == 1


def test_autocast():
    model, compiled = build_model(torch.float32, text=ONE_LAYER), build_model(torch.float32, text=ONE_LAYER)
    graphs = compile_text_model(compiled, fullgraph=True)
    inputs = Prompts(build_config(), torch.float32).one([5, VIDEO, 7])
    with torch.autocast("cpu", torch.bfloat16):
        # Gates are linear layers over all rows here, over the vision rows there: bfloat16 rounds alike at these sizes.
        assert_same_results(model, compiled, inputs, 2 * torch.finfo(torch.bfloat16).eps)
    assert len(graphs) == 1


@pytest.mark.parametrize("build", [build_model, build_released], ids=["paper", "released"])
def test_layers_that_are_not_compiled_take_what_a_compiled_model_hands_them(build, prompts):
    """As they do past the compiler's limit of recompilations."""
    model = build(text=ONE_LAYER)
    inputs = prompts.one([5, VIDEO, 7])
    positions = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )[0]
    call = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "position_ids": positions}
    call["mm_token_type_ids"] = inputs["mm_token_type_ids"]
    with torch.no_grad():
        expected = model(**call).logits
        for block in model.model.language_model.layers:
            block.forward = torch.compiler.disable(block.forward)
        logits = torch.compile(model, backend="eager")(**call).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def test_what_is_wrong_with_a_call_is_said_when_it_runs(prompts):
    model = build_model(text=ONE_LAYER)
    inputs = prompts.one([5, VIDEO, 7])
    embeds, length = model.get_input_embeddings()(inputs["input_ids"]), inputs["input_ids"].shape[1]
    restarting = (torch.arange(length) % 20).expand(3, 1, -1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    call = {"inputs_embeds": embeds, "mm_token_type_ids": inputs["mm_token_type_ids"]}
    with torch.no_grad():
        compiled(**call, position_ids=torch.arange(length).expand(3, 1, -1).clone())
        with pytest.raises(ValueError, match="packs several samples"):
            compiled(**call, position_ids=restarting.clone())


def test_the_choice_of_a_backend_is_said_once(prompts, caplog):
    utils._choose.cache_clear()
    model = build_model(nsa_backend="auto", text=ONE_LAYER)
    compile_text_model(model, fullgraph=True)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for layout in LAYOUTS[:2]:
            model(**prompts.one(layout))
    assert sum("backend='auto' chose 'torch'" in record.getMessage() for record in caplog.records) == 1


def test_namespace_is_that_of_the_code():
    """The same in every process, so that what compilers cache on the disk stays valid, and no longer."""
    assert operators._namespace() == operators.NAMESPACE
    assert attention._operator._qualname == f"{operators.NAMESPACE}::nsa_attention"
