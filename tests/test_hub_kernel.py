"""`nsa_kernels/` as a Hub kernel, loaded by Hugging Face's own `kernels` library from a folder and from a Hub.

The library is installed aside: where transformers finds it, it takes kernels of its own from the Hub.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_client
import pytest
import torch
from conftest import ROOT
from fake_hub import FakeHub
from kernel_client import compute
from safetensors.torch import load_file

from nsa_kernels import attention

spec = importlib.util.spec_from_file_location("build_hub_kernel", ROOT / "tools" / "build_hub_kernel.py")
build_hub_kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_hub_kernel)

LIBRARY = "kernels==0.17.2"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel") / "nsa-attention"
    build_hub_kernel.build(folder)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with the library and nothing that the environment has."""
    folder = tmp_path_factory.mktemp("library")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", str(folder)]
    done = subprocess.run([*pip, LIBRARY], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{LIBRARY} could not be installed: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="module")
def expected():
    return compute(attention.nsa_attention)


def use(source, library, tmp_path, **environment):
    # Without telemetry, kernels 0.17.2 ends its user agent with a blank, which httpx refuses.
    environment = os.environ | environment | {"PYTHONPATH": str(library), "HF_HUB_DISABLE_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, kernel_client.__file__, str(source), str(tmp_path / "o.safetensors")],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "o.safetensors")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_from_a_folder(built, library, tmp_path, expected):
    assert_equal(use(built, library, tmp_path), expected)


def test_from_the_hub(built, library, tmp_path, expected):
    """Uploaded by the client, as the tool says."""
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "cache")
        hf = [Path(sys.executable).with_name("hf"), "upload", "--repo-type", "kernel", "me/nsa-attention", built]
        subprocess.run([*hf, "--revision", "v1"], env=os.environ | environment, check=True, capture_output=True)
        assert_equal(use("me/nsa-attention", library, tmp_path, **environment), expected)


def test_every_module_is_there(built):
    names = {path.name for path in (ROOT / "nsa_kernels").glob("*.py")}
    for backend in ("cuda", "cpu"):
        folder = built / "build" / f"torch-{backend}"
        assert {path.name for path in folder.iterdir()} == names | {"metadata.json"}
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["version"] == 1


def test_kernels_need_torch_and_triton_alone():
    """A Hub kernel may need nothing else; transformers least of all, whose models are to use it."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in (ROOT / "nsa_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, (path.name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, (path.name, node.lineno)


def test_what_is_there_is_not_removed(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=r"output = .* is no folder of a kernel"):
        build_hub_kernel.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    for name in ("README.md", "build/notes.txt"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match="output"):
            build_hub_kernel.build(folder)
        assert (folder / name).read_text() == "mine"
    file = tmp_path / "thesis.txt"
    with pytest.raises(ValueError, match="output"):
        build_hub_kernel.build(file)


def test_built_again(built, tmp_path):
    output = tmp_path / "k"
    build_hub_kernel.build(output)
    build_hub_kernel.build(output)
    for path in built.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (output / path.relative_to(built)).read_bytes()


def test_a_missing_name_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(build_hub_kernel.PUBLIC, "dense", ("no_such",))
    with pytest.raises(ValueError, match=r"dense\.py has no no_such"):
        build_hub_kernel.build(tmp_path / "k")
    assert not (tmp_path / "k").exists()
