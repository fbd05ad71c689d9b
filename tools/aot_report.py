"""Compile every Triton kernel ahead of time, without a GPU, and report what each one takes from a multiprocessor.

    python tools/aot_report.py                                       # all: docs/aot.md, benchmarks/results/aot.json
    python tools/aot_report.py --shapes 7B --targets 90 --output ""  # a part of it, on the terminal alone
    python tools/aot_report.py --note after                          # what docs/aot.md compares, with this Triton
    python tools/aot_report.py --note "two blocks" --tuning selection_span=2

The launches are not listed here. Each branch's own entry points run on fake CUDA tensors, which have shapes but no
memory, and every launch they would make is recorded instead: constexprs, warps, stages and argument types are those of
the code, and specialised as Triton's launcher would (pointers and sizes divisible by 16, sizes equal to 1). A kernel
that no shape launches is an error. Registers, stack, local memory accesses and matrix instructions are read from the
machine code by the cuobjdump that Triton brings.

The exit code is 1 where a kernel touches local memory in an innermost loop on sm_90, or at all if it has no loop
(spills, or an array that is not kept in registers), does not compile, or needs more shared memory than a block can
have. A few values that wait outside of the loops for their end cost nothing that counts.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from tqdm import tqdm  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from nsa_kernels import triton_attention, triton_rows, triton_tiles, utils  # noqa: E402

# Compute capability -> shared memory that one block can have, and that a multiprocessor has, in bytes. 8.6 runs the
# code of 8.0 with less than it has, so kernels for it must do with that.
SHARED_MEMORY = {
    80: (99 * 1024, 164 * 1024),
    89: (99 * 1024, 100 * 1024),
    90: (227 * 1024, 228 * 1024),
    100: (227 * 1024, 228 * 1024),
    120: (99 * 1024, 100 * 1024),
}
# What `--note` has written: label -> version of Triton -> readings.
NOTES = ROOT / "benchmarks" / "results" / "aot_notes.json"
# Where local memory in loops is a failure. The other targets are compiled at the shapes of a 7B model alone.
STRICT_TARGETS = (90,)

POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Shape:
    """One call of the attention, and the text rows that follow it."""

    name: str
    tokens: int = 131072
    heads: tuple[int, int] = (28, 4)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 64
    block_counts: int = 32
    window_size: int = 256
    text_rows: tuple[int, ...] = (16, 512)


SHAPES = [
    Shape("7B"),
    Shape("7B, 4K", tokens=4096, text_rows=(1,)),
    Shape("7B, 1K", tokens=1024),  # selection is dense
    Shape("7B, fp16", dtype=torch.float16),
    Shape("fp32", tokens=32768, dtype=torch.float32),
    Shape("3B", heads=(16, 2)),
    Shape("32B", heads=(40, 8)),
    Shape("group 16", heads=(16, 1)),
    Shape("D 32", head_dim=32),
    Shape("D 64", head_dim=64),
    Shape("D 96", head_dim=96),
    Shape("blocks of 16", block_size=16, block_counts=64, tokens=65536),
    Shape("blocks of 128", block_size=128, block_counts=16),
]


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be compiled for one launch."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, object], ...]


@dataclass
class Recorder:
    """Stands in for `JITFunction.run`: notes the launches that a GPU of that compute capability gets, does nothing."""

    target: int = 90
    launches: list[Launch] = field(default_factory=list)

    @contextlib.contextmanager
    def recording(self):
        def run(kernel, *args, grid, warmup, **kwargs):
            self.launches.append(describe_launch(kernel, args, kwargs))

        # What the launch code asks a GPU. The number of multiprocessors is an H200's: no tile depends on it.
        properties = SimpleNamespace(
            multi_processor_count=132, shared_memory_per_block_optin=SHARED_MEMORY[self.target][0]
        )
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
            FakeTensorMode(),
        ):
            yield self


def describe_launch(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    """The specialisation that Triton's launcher would choose for these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: value for name, value in values.items() if name not in kernel.arg_names}
    signature, constexprs, divisible = {}, {}, []
    for param in kernel.params:
        name, value = param.name, values.get(param.name, param.default)
        may_specialise = not param.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER_TYPES[value.dtype]
            # Where the allocator puts a tensor is a multiple of 16; a view's offset has to be, too.
            if may_specialise and value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif param.is_constexpr or value is None or (type(value) is int and value == 1 and may_specialise):
            signature[name] = "constexpr"
            constexprs[name] = value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if may_specialise and value % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: cannot tell the type of {name} = {value!r}")
    return Launch(
        kernel.fn.__module__,
        kernel.__name__,
        tuple(signature.items()),
        tuple(constexprs.items()),
        tuple(divisible),
        tuple(sorted(options.items())),
    )


def kernel_modules() -> list:
    """The modules of nsa_kernels/ that hold Triton kernels."""
    return [
        importlib.import_module(f"nsa_kernels.{path.stem}")
        for path in sorted((ROOT / "nsa_kernels").glob("triton_*.py"))
    ]


def kernel_names(modules: list) -> set[str]:
    """Every kernel, that is, every jitted function whose name ends in `_kernel`: the others are their helpers."""
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


class FakeContext(SimpleNamespace):
    """The context of an autograd function whose forward and backward are called by hand."""

    needs_input_grad = (True,)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def run_shape(shape: Shape) -> None:
    """Every launch of a forward and a backward pass. Autograd itself would ask for a real device."""
    (num_heads, num_kv_heads), scale = shape.heads, shape.head_dim**-0.5
    lengths = utils.SequenceLengths.from_lengths([shape.tokens], device="cuda")

    def rows(count, heads):
        return torch.empty(count, heads, shape.head_dim, dtype=shape.dtype, device="cuda")

    q, do = rows(shape.tokens, num_heads), rows(shape.tokens, num_heads)
    k, v = rows(shape.tokens, num_kv_heads), rows(shape.tokens, num_kv_heads)
    # The model's gates are one tensor, unbound along its last dimension.
    gates = torch.empty(shape.tokens, num_heads, 3, dtype=shape.dtype, device="cuda").unbind(-1)
    settings = lengths, shape.block_size, shape.block_counts, shape.window_size, scale
    # Where selection is dense, torch computes it or a kernel does.
    for o_dense in (None, torch.empty_like(q)):
        context = FakeContext()
        triton_attention._NSAFunction.forward(context, q, k, v, *gates, o_dense, *settings)
        triton_attention._NSAFunction.backward(context, do)
    for count in shape.text_rows:
        for positions in (None, torch.empty(count, dtype=torch.int64, device="cuda")):
            text_q, text_do = rows(count, num_heads), rows(count, num_heads)
            o, lse = triton_rows.text_rows_fwd(text_q, k, v, scale, positions)
            triton_rows.text_rows_bwd(text_q, k, v, o, lse, text_do, scale, positions)


def record(shapes: list[Shape], target: int) -> dict[Launch, list[str]]:
    """Distinct launches on a target, each with the names of the shapes that make it."""
    found: dict[Launch, list[str]] = {}
    for shape in shapes:
        with Recorder(target).recording() as recorder:
            run_shape(shape)
        for launch in dict.fromkeys(recorder.launches):
            found.setdefault(launch, []).append(shape.name)
    missing = kernel_names(kernel_modules()) - {launch.kernel for launch in found}
    if missing:
        raise RuntimeError(f"no shape launches {', '.join(sorted(missing))}")
    return found


def compile_launch(launch: Launch, target: int) -> dict:
    """Resources of one launch on one target; "error" in place of them where it does not compile."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    result = {"kernel": launch.kernel, "target": target, **dict(launch.options)}
    result["constexprs"] = {name: value for name, value in launch.constexprs if name.isupper()}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(kernel.arg_names.index(name),): value for name, value in launch.constexprs},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(launch.options))
    except Exception as error:  # whatever the compiler raises belongs into the report
        return {**result, "error": f"{type(error).__name__}: {str(error)[-500:]}"}
    result["shared"] = compiled.metadata.shared
    result |= read_resources(compiled)
    result["compile_seconds"] = round(time.perf_counter() - start, 2)
    warps, (_, shared_per_sm) = result["num_warps"], SHARED_MEMORY[target]
    by_registers = 65536 // (-(-result["registers"] // 8) * 8 * 32 * warps)
    by_shared = shared_per_sm // (result["shared"] + 1024)
    result["blocks_per_sm"] = min(by_registers, by_shared, 64 // warps, 32)
    return result


def read_code(code: str) -> dict:
    """What the disassembled machine code of a kernel consists of.

    Returns:
        instructions, barriers, local_loads, local_stores: of all of it.
        loops: [instructions, barriers, matrix instructions, instructions of the shortest way through it, accesses to
            local memory] of every loop that holds no other loop, the longest first. Barriers are those of a whole
            block, which its warps wait at for each other. The shortest way takes every branch that skips something, a
            mask that is not needed, say.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    places = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    names = [name for _, _, name, _ in found]
    # What follows the last exit is padding, and a jump to itself.
    end = max((i for i, name in enumerate(names) if name == "EXIT"), default=len(names) - 1) + 1

    def count(first, last, pattern):
        return sum(re.match(pattern, name) is not None for name in names[first:last])

    # Instruction -> where it may jump to, and whether it does so always.
    jumps = {}
    for i, (_, predicate, name, operands) in enumerate(found[:end]):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target:
            jumps[i] = places.get(int(target.group(1), 16), end), not predicate
    backward = [(target, i + 1) for i, (target, _) in jumps.items() if target <= i]

    def shortest(first, last):
        steps = {last: 0}
        for i in reversed(range(first, last)):
            target, always = jumps.get(i, (i + 1, False))
            ways = [steps[j] for j in ([target] if always else [i + 1, target]) if j in steps and j > i]
            if i == last - 1 or target == first:
                ways.append(0)
            if ways:
                steps[i] = 1 + min(ways)
        return steps.get(first, last - first)  # there is none where every way leaves the loop

    loops = [
        [
            last - first,
            count(first, last, r"BAR\b"),
            count(first, last, r"\w*(GMMA|HMMA|UTC\w*MMA)\b"),
            shortest(first, last),
            count(first, last, r"(LDL|STL)\b"),
        ]
        for first, last in backward
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in backward)
    ]
    return {
        "instructions": end,
        "barriers": count(0, end, r"BAR\b"),
        "local_loads": count(0, end, r"LDL\b"),
        "local_stores": count(0, end, r"STL\b"),
        "loops": sorted(loops, reverse=True),
    }


def read_resources(compiled) -> dict:
    """Registers and stack of the machine code, what it consists of, and its matrix instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(option):
            return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout

        usage = dump("--dump-resource-usage")
        read = lambda key: int(re.search(rf"\b{key}:(\d+)", usage).group(1))  # noqa: E731
        code = read_code(dump("--dump-sass"))
    matrix = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}
    counts = {kind: len(re.findall(pattern, compiled.asm["ptx"])) for kind, pattern in matrix.items()}
    return {
        "registers": read("REG"),
        "stack": read("STACK") + read("LOCAL"),
        **code,
        "matrix_instructions": {kind: count for kind, count in counts.items() if count},
    }


def failures(results: list[dict]) -> list[str]:
    """What is wrong with the results, one line each."""
    found = []
    for result in results:
        where = f"{result['kernel']} on sm_{result['target']} ({'; '.join(result['shapes'])})"
        if "error" in result:
            found.append(f"{where}: {result['error']}")
            continue
        if result["shared"] > SHARED_MEMORY[result["target"]][0]:
            found.append(f"{where}: {result['shared']} bytes of shared memory")
        accesses = result["local_loads"] + result["local_stores"]
        paid_often = max((loop[4] for loop in result["loops"]), default=accesses)
        if result["target"] in STRICT_TARGETS and paid_often:
            found.append(f"{where}: stack {result['stack']} bytes, {accesses} local accesses, {paid_often} in a loop")
    return found


def merged(results: list[dict], target: int) -> list[dict]:
    """One target's results; launches of a kernel that take the same resources become one."""
    rows: dict[str, dict] = {}
    for result in results:
        if result["target"] == target:
            reading = {k: v for k, v in result.items() if k not in ("shapes", "constexprs", "compile_seconds")}
            row = rows.setdefault(repr(reading), {**reading, "shapes": []})
            row["shapes"] += [shape for shape in result["shapes"] if shape not in row["shapes"]]
    return list(rows.values())


def note(label: str, jobs: int, tuning: dict[str, int | bool]) -> None:
    """Keep what kernels take at the 7B shape on sm_90, under a label, for the comparison in the table.

    Args:
        tuning: values of `triton_tiles.tuning` that are not the usual ones; then only kernels that they change.
    """
    shapes = [shape for shape in SHAPES if shape.name == "7B"]
    launches = record(shapes, 90)
    if tuning:
        with mock.patch.object(triton_tiles, "tuning", dataclasses.replace(triton_tiles.tuning, **tuning)):
            launches = record(shapes, 90).keys() - launches.keys()
    results = compile_all(list(launches), [90] * len(launches), jobs)
    names = "kernel", "instructions", "barriers", "registers", "stack", "shared", "loops"
    readings = [{name: result[name] for name in names} for result in results]
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    notes.setdefault(label, {})[triton.__version__] = sorted(readings, key=lambda reading: reading["kernel"])
    NOTES.write_text(json.dumps(notes) + "\n")


def setting(text: str) -> tuple[str, int | bool]:
    """``name=2`` or ``name=False``, of an argument, as a name and a value."""
    name, _, value = text.partition("=")
    return name, ast.literal_eval(value)


def compile_all(launches: list[Launch], targets: list[int], jobs: int) -> list[dict]:
    """`compile_launch` of each, in so many processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        compiled = pool.map(compile_launch, launches, targets)
        return list(tqdm(compiled, "Kernels", len(launches), disable=None))


def comparison() -> list[str]:
    """The lines of the table of what `--note` has kept."""
    if not NOTES.exists():
        return []
    notes = json.loads(NOTES.read_text())
    lines = [
        "## Before and after",
        "",
        "The 7B shape on sm_90, with the labels and versions of Triton under which `python tools/aot_report.py --note",
        "LABEL` was run; labels other than before and after are of `--tuning`, and have the kernels that it changes. A",
        "step is one pass through an innermost loop, of those with the most matrix instructions, and without any of",
        "the longest: its instructions, those of the shortest way through it (without masks that are skipped), and its",
        "barriers. What is launched in several forms has several rows.",
        "",
        "| kernel | label | Triton | instructions | barriers | step | shortest | barriers | registers | stack B "
        "| shared B |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for label, versions in notes.items():
        for version, readings in versions.items():
            for r in readings:
                most = max((loop[2] for loop in r["loops"]), default=0)
                # They lie longest first.
                steps = [loop for loop in r["loops"] if loop[2] == most] if most else r["loops"][:1]
                in_steps = [" / ".join(str(loop[i]) for loop in steps) for i in (0, 3, 1)]
                row = [f"`{r['kernel']}`", label, version, r["instructions"], r["barriers"], *in_steps]
                rows.append([*row, r["registers"], r["stack"], r["shared"]])
    # The same kernel with the same Triton side by side.
    order = list(notes)
    rows.sort(key=lambda row: (row[0], row[2], order.index(row[1])))
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def to_markdown(results: list[dict], command: str) -> str:
    lines = [
        "# What each Triton kernel takes from a multiprocessor",
        "",
        f"Written by `{command}` with Triton {triton.__version__}.",
        "",
        "Compiled ahead of time and read from the machine code: nothing here was run or timed. The launches are those",
        "that the code makes for a forward and a backward pass, and for text rows, at the shapes named: 28 query and",
        "4 key/value heads, head_dim 128, bf16, blocks of 64, 32 of them selected, a window of 256 and 128K tokens,",
        "except where the name says otherwise (3B: 16 and 2 heads; 32B: 40 and 8; group 16: 16 and 1; fp32: 32K",
        "tokens; blocks of 16: 64 selected, 64K tokens; blocks of 128: 16 selected). Local memory is spills and stack:",
        "on sm_90 there must be none in the innermost loops. Blocks per SM is what registers, shared memory and warps",
        "allow.",
        "",
    ]
    for target in sorted({result["target"] for result in results}):
        lines += [
            f"## sm_{target}",
            "",
            "| kernel | shapes | warps | stages | registers | stack B | local ld / st | shared B | blocks per SM "
            "| matrix instructions | instructions | barriers |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in merged(results, target):
            row = [f"`{r['kernel']}`", "; ".join(r["shapes"]), r["num_warps"], r.get("num_stages", "default")]
            if "error" in r:
                row += ["does not compile", *[""] * 7]
            else:
                matrix = ", ".join(f"{kind} {n}" for kind, n in r["matrix_instructions"].items()) or "none"
                row += [r["registers"], r["stack"], f"{r['local_loads']} / {r['local_stores']}", r["shared"]]
                row += [r["blocks_per_sm"], matrix, r["instructions"], r["barriers"]]
            lines.append("| " + " | ".join(map(str, row)) + " |")
        lines.append("")
    return "\n".join([*lines, *comparison()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES], choices=[s.name for s in SHAPES])
    parser.add_argument("--targets", nargs="+", type=int, default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--output", default="benchmarks/results/aot.json", help="JSON file; empty for none")
    parser.add_argument("--markdown", default="docs/aot.md", help="table to write; only together with --output")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--note", metavar="LABEL", help="keep the readings that docs/aot.md compares, nothing else")
    parser.add_argument(
        "--tuning", nargs="+", type=setting, default=[], help="for --note: name=value, of triton_tiles.Tuning"
    )
    args = parser.parse_args()
    if args.note:
        note(args.note, args.jobs, dict(args.tuning))
        return 0

    work, shapes_of = [], []
    for target in args.targets:
        launches = record([shape for shape in SHAPES if shape.name in args.shapes], target)
        for launch, names in launches.items():
            if target in STRICT_TARGETS or any(name.startswith("7B") for name in names):
                work.append((launch, target))
                shapes_of.append(names)
    print(f"{len(work)} launches of {len({launch.kernel for launch, _ in work})} kernels to compile", flush=True)
    results = compile_all(*map(list, zip(*work, strict=True)), args.jobs)
    for result, names in zip(results, shapes_of, strict=True):
        result["shapes"] = names
    results.sort(key=lambda r: (r["target"], r["kernel"]))
    command = " ".join(["python", "tools/aot_report.py", *sys.argv[1:]])
    if args.output:
        report = {"command": command, "triton": triton.__version__, "torch": torch.__version__, "results": results}
        Path(args.output).write_text(json.dumps(report, indent=1, default=str) + "\n")
        Path(args.markdown).write_text(to_markdown(results, command))
    else:
        print(to_markdown(results, command))
    problems = failures(results)
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(results)} compiled, {len(problems)} failures")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
