"""Make a Hub kernel of `nsa_kernels/`: a repository that Hugging Face's `kernels` library loads for any model.

    python tools/build_hub_kernel.py --output build/nsa-attention
    hf upload --repo-type kernel me/nsa-attention build/nsa-attention --revision v1

and then, in any program,

    from kernels import get_kernel
    nsa_attention = get_kernel("me/nsa-attention", version=1, trust_remote_code=True).nsa_attention

The layout is that of the library's "kernel requirements": one folder for each backend under `build/`, a Python package
with its `metadata.json`. Nothing is compiled: Triton does that where the kernel runs, and a CPU runs torch.
"""

import argparse
import ast
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "nsa_kernels"

NAME = "nsa-attention"
VERSION = 1
"""Of the interface: a branch `v1` of the repository. To be raised with a change that breaks callers."""
BACKENDS = ("cuda", "cpu")
# What the package offers, by the module that has it.
PUBLIC = {
    "attention": ("nsa_attention", "SequenceLengths", "BACKENDS"),
    "compression": ("compression_attention", "mean_pool", "select_blocks"),
    "selection": ("selection_attention",),
    "sliding_window": ("sliding_window_attention",),
    "dense": ("text_rows_attention",),
}
CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernel
- triton
---

# Native Sparse Attention

`nsa_attention`, forward and backward, for any number of query heads a key/value head, over packed sequences: the
attention of VideoNSA (arXiv 2510.02295; Native Sparse Attention, arXiv 2502.11089). Triton on CUDA, torch elsewhere.

```python
from kernels import get_kernel

nsa = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
o = nsa.nsa_attention(q, k, v, g_cmp, g_slc, g_swa, cu_seqlens, block_size=64, block_counts=32, window_size=256)
help(nsa.nsa_attention)
```
"""


def build(output: Path, repo_id: str = f"me/{NAME}") -> None:
    """Write the repository's files.

    Args:
        output: a folder that is not there yet, or one that this has written.
        repo_id: for the card.
    Raises:
        ValueError: the folder holds something else, or a module lacks a public name.
    """
    output = Path(output)
    if output.exists() and not _is_ours(output):
        raise ValueError(f"output = {str(output)!r} is no folder of a kernel: choose one that is not there yet")
    sources = {path.name: path.read_text() for path in sorted(SOURCE.glob("*.py")) if path.name != "__init__.py"}
    init = _init(sources)
    digest = hashlib.sha256(json.dumps(sources | {"__init__.py": init}).encode()).hexdigest()[:12]
    shutil.rmtree(output, ignore_errors=True)
    for backend in BACKENDS:
        folder = output / "build" / f"torch-{backend}"
        folder.mkdir(parents=True)
        for name, text in (sources | {"__init__.py": init}).items():
            (folder / name).write_text(text)
        metadata = {
            "id": f"_nsa_attention_{backend}_{digest}",  # the module's name: versions lie side by side in a process
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (output / "README.md").write_text(CARD.format(repo_id=repo_id, version=VERSION))


def _is_ours(folder: Path) -> bool:
    """Whether the folder is empty, or `build` has written all that is in it."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {"build", "README.md"}:
        return False
    files = [folder / "build" / f"torch-{backend}" / "metadata.json" for backend in BACKENDS]
    is_empty = not any(folder.iterdir())
    return is_empty or all(file.is_file() and json.loads(file.read_text()).get("name") == NAME for file in files)


def _init(sources: dict[str, str]) -> str:
    """The package's `__init__.py`: the public names."""
    lines = ['"""Native Sparse Attention."""', ""]
    for module, names in PUBLIC.items():
        body = ast.parse(sources[f"{module}.py"]).body
        functions = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        values = {
            target.id
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if missing := set(names) - functions - values:
            raise ValueError(f"nsa_kernels/{module}.py has no {', '.join(sorted(missing))}")
        lines.append(f"from .{module} import {', '.join(names)}")
    names = [name for names in PUBLIC.values() for name in names]
    return "\n".join([*lines, "", f"__all__ = {json.dumps(names)}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / NAME)
    parser.add_argument("--repo-id", default=f"me/{NAME}", help="for the card")
    arguments = parser.parse_args()
    try:
        build(arguments.output, arguments.repo_id)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"wrote {arguments.output}; hf upload --repo-type kernel {arguments.repo_id} {arguments.output} --revision v1"
    )


if __name__ == "__main__":
    main()
