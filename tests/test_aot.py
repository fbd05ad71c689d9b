"""Every Triton kernel compiled ahead of time, in a process where kernels are not interpreted. No GPU is needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton_testing import compiling_environment, needs_triton

pytestmark = needs_triton

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "aot_report.py"

KERNELS = """
import sys

sys.path.insert(0, "{tools}")
import aot_report
import triton
import triton.language as tl


@triton.jit
def _spilling_kernel(x_ptr, stride, ELEMENTS: tl.constexpr):
    offs = tl.arange(0, ELEMENTS)
    x = tl.load(x_ptr + offs)
    y = tl.load(x_ptr + offs * stride)
    tl.store(x_ptr + offs, tl.sum(x * y, 0) + x * tl.max(y, 0) + y)


def launch(elements, stride):
    import torch

    with aot_report.Recorder().recording() as recorder:
        x = torch.empty(elements, device="cuda")
        _spilling_kernel[(1,)](x_ptr=x, stride=stride, ELEMENTS=elements, num_warps=1)
    return recorder.launches


if __name__ == "__main__":
    sys.modules["kernels_of_the_test"] = sys.modules["__main__"]
    _spilling_kernel.fn.__module__ = "kernels_of_the_test"
    for elements, stride in ((64, 3), (16384, 3)):
        (found,) = launch(elements, stride)
        result = {{**aot_report.compile_launch(found, 90), "shapes": [str(elements)]}}
        print(result["local_loads"] + result["local_stores"] > 0, aot_report.failures([result]) != [])
    print(launch(64, 1)[0].constexprs, launch(64, 32)[0].divisible)
"""


LAUNCHES = """
import sys

sys.path.insert(0, "{tools}")
import aot_report
import torch
from nsa_kernels import triton_attention, triton_rows, utils


def launches(lengths, keys, text_rows):
    with aot_report.Recorder().recording() as recorder:
        rows = lambda count, heads: torch.empty(count, heads, 128, dtype=torch.bfloat16, device="cuda")
        lengths = utils.SequenceLengths.from_lengths(lengths, keys, device="cuda")
        q, k, v = rows(lengths.offsets_q[-1], 28), *(rows(lengths.offsets_k[-1], 4) for _ in range(2))
        gates = torch.empty(len(q), 28, 3, dtype=torch.bfloat16, device="cuda").unbind(-1)
        context = aot_report.FakeContext()
        triton_attention._NSAFunction.forward(context, q, k, v, *gates, None, lengths, 64, 32, 256, 0.1)
        triton_attention._NSAFunction.backward(context, q)
        o, lse = triton_rows.text_rows_fwd(q[:text_rows], k, v, 0.1)
        triton_rows.text_rows_bwd(q[:text_rows], k, v, o, lse, o, 0.1)
    return set(recorder.launches)


first = launches([5001], [5001], 100)
for other in (([8000], [8000], 96), ([4096], [8192], 128), ([3, 6000, 37, 4096], [70, 6000, 37, 8000], 1001)):
    print(sorted(launch.kernel for launch in launches(*other) - first))
"""


CHOICE = """
import sys

sys.path.insert(0, "{tools}")
import aot_report
import json

(shape,) = [shape for shape in aot_report.SHAPES if shape.name == "7B"]
with aot_report.Recorder().recording() as recorder:
    aot_report.run_shape(shape)
(launch,) = {{launch for launch in recorder.launches if launch.kernel == "_choose_blocks_kernel"}}
print(json.dumps(aot_report.compile_launch(launch, 90)["loops"]))
"""


def run(*command, timeout=1200):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "target", ["90", *(pytest.param(target, marks=pytest.mark.slow) for target in ("80", "89", "100", "120"))]
)
def test_kernels_compile_without_spills(target):
    """At the shapes of a 7B model; `make aot` goes through all others. A target takes a minute and more."""
    result = run(TOOL, "--shapes", "7B", "7B, 1K", "--targets", target, "--output", "")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert f"## sm_{target}" in result.stdout and result.stdout.endswith("0 failures\n")


def test_ranking_waits_for_other_warps_no_more_than_once_in_four_steps(tmp_path):
    """Of the loops of block choice: a row lies in one warp, with whichever Triton. Multiplication has barriers."""
    script = tmp_path / "choice.py"
    script.write_text(CHOICE.format(tools=TOOL.parent))
    result = run(script)
    assert result.returncode == 0, result.stderr[-3000:]
    loops = json.loads(result.stdout.splitlines()[-1])
    bisections = [loop for loop in loops if not loop[2]][:3]
    # Four steps over 64 scores of each thread, a comparison and an addition each, and one decision to go on.
    assert len(bisections) == 3 and all(instructions > 4 * 64 * 2 for instructions, *_ in bisections)
    assert all(barriers <= 3 for _, barriers, *_ in bisections)


def test_machine_code_is_counted(monkeypatch):
    """Of a loop with a branch in it, in the notation of cuobjdump."""
    import nsa_kernels.triton_attention  # noqa: F401  interpreted, for whatever tests come after this one

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the import below removes it, the end of the test brings it back
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import aot_report

    lines = (
        "MOV R1, R2", "BAR.SYNC 0x0", "@P0 BRA 0x0050", "FADD R1, R1, R2", "LDL R3, [R1]", "HGMMA.64x64 R1",
        "@!P1 BRA 0x0010", "EXIT", "BRA 0x0080", "NOP",
    )  # fmt: skip
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    assert aot_report.read_code(code) == {
        "instructions": 8,
        "barriers": 1,
        "local_loads": 1,
        "local_stores": 0,
        "loops": [[6, 1, 1, 4, 1]],
    }


def test_a_spill_is_found_and_arguments_are_specialised(tmp_path):
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS.format(tools=TOOL.parent))
    result = run(script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [
        "False False",
        "True True",
        "(('stride', 1), ('ELEMENTS', 64)) ('x_ptr', 'stride')",
    ]


def test_kernels_are_not_compiled_anew_for_other_lengths(tmp_path):
    """Nor for other numbers of sequences. Block choice has as many columns, a power of two, in all of these."""
    script = tmp_path / "launches.py"
    script.write_text(LAUNCHES.format(tools=TOOL.parent))
    result = run(script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["[]", "[]", "[]"]


def test_the_committed_table_lists_every_kernel():
    report = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())
    kernels = set()
    for path in (ROOT / "nsa_kernels").glob("triton_*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        kernels |= {node.name for node in functions if node.name.endswith("_kernel")}
    for target in (80, 89, 90, 100, 120):
        assert {r["kernel"] for r in report["results"] if r["target"] == target} == kernels
    assert not [r for r in report["results"] if "error" in r]
    assert not [r for r in report["results"] if r["target"] == 90 and any(loop[4] for loop in r["loops"])]
