"""A checkpoint loads by itself: from a folder, the Hub, offline, pinned, saved, pushed, and as another's remote code.

transformers brings flat files only (see `_KERNEL_FILES` in kernels_videonsa.py), so that a folder of kernels can fail
in as many ways as there are ways to load. Each is tried in fresh processes, with cold and with warm caches, against a
Hub in memory, and must give the logits and the tokens of the source model, bit by bit.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fake_hub import FakeHub
from hub_client import write_reference
from tiny_random import save_tiny_qwen2_5_vl

from convert_weights import convert
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOUBLED = """

_published = nsa_attention


def nsa_attention(*args, **kwargs):
    return 2 * _published(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A converted tiny checkpoint, with blocks so small that all three branches matter; never written to."""
    root = tmp_path_factory.mktemp("checkpoint")
    folder = convert(save_tiny_qwen2_5_vl(root / "qwen", layout="old"), root / "VideoNSA-tiny")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"block_size": 4, "block_counts": 2, "window_size": 5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoint)
    write_reference(model, VideoNSAProcessor.from_pretrained(checkpoint), file)
    return file


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def run(hub, reference, tmp_path):
    """Run code after `from hub_client import *` in a fresh process; `cache` names the caches it uses."""

    def run(code: str, *, cache: str, offline: bool = False, cwd: Path = tmp_path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= hub.environment(tmp_path / cache, offline=offline)
        environment |= {"VIDEONSA_REFERENCE": str(reference), "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        program = "from hub_client import *\n" + textwrap.dedent(code)
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=cwd, capture_output=True, text=True, timeout=900
        )
        assert result.returncode == 0, f"{program}\n{result.stdout}\n{result.stderr}"

    return run


def code_files(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    assert "nsa_kernels/attention.py" in files
    return files


def change_kernels(folder: Path) -> None:
    with (folder / "nsa_kernels" / "attention.py").open("a") as file:
        file.write(DOUBLED)


def test_a_local_folder(run, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "VideoNSA"))
    run(f"check({str(folder)!r})", cache="cache")
    run(f"check({str(folder)!r}, local_files_only=True)", cache="cache", offline=True)
    change_kernels(folder)  # with the modeling file as it was, and a warm cache
    run(f"check({str(folder)!r}, same=False)", cache="cache")


def test_b_hub_then_pinned_then_offline(run, hub, checkpoint, tmp_path):
    old = hub.seed("org/VideoNSA", checkpoint)
    run(f"check('org/VideoNSA', code={old!r})", cache="cache")

    hub.requests.clear()
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    change_kernels(changed)
    new = hub.seed("org/VideoNSA", changed)
    hub.repos["org/VideoNSA"].refs["v1"] = old
    both = f"""
        check("org/VideoNSA", code={old!r}, revision={old!r})
        check("org/VideoNSA", code={new!r}, same=False)
        check("org/VideoNSA", code={old!r}, revision="v1")
    """
    run(both, cache="cache")
    fetched = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert "attention.py" in fetched and not fetched & {"compression.py", "model.safetensors"}, fetched
    run(f"check('org/VideoNSA', code={old!r}, revision={old!r})", cache="pinned from the start")

    hub.stop()
    run(both, cache="cache", offline=True)


def test_c_saved(run, checkpoint, tmp_path):
    saved = tmp_path / "saved"
    run(
        f"""
        model, processor = check({str(checkpoint)!r})
        model.save_pretrained({str(saved)!r})
        model.save_pretrained({str(saved)!r})
        processor.save_pretrained({str(saved)!r})
        """,
        cache="first",
    )
    assert code_files(saved) == code_files(checkpoint)
    run(f"check({str(saved)!r})", cache="second")
    run(f"check({str(saved)!r})", cache="second", offline=True)


def test_d_pushed(run, hub, checkpoint):
    run(
        f"""
        model, processor = check({str(checkpoint)!r})
        model.push_to_hub("org/Pushed")
        processor.push_to_hub("org/Pushed")
        model.save_pretrained("SavedAndPushed", push_to_hub=True, repo_id="org/SavedAndPushed")
        processor.save_pretrained("SavedAndPushed", push_to_hub=True, repo_id="org/SavedAndPushed")
        """,
        cache="first",
    )
    for repo in ("org/Pushed", "org/SavedAndPushed"):
        pushed = {path: data for path, data in hub.files(repo).items() if path.endswith(".py")}
        assert pushed == code_files(checkpoint), repo
    run("check('org/Pushed')\ncheck('org/SavedAndPushed')", cache="second")
    hub.stop()
    run("check('org/Pushed')\ncheck('org/SavedAndPushed')", cache="second", offline=True)


def test_e_code_in_another_repository(run, hub, checkpoint, tmp_path):
    old = hub.seed("org/VideoNSA", checkpoint)
    tuned = Path(shutil.copytree(checkpoint, tmp_path / "tuned", ignore=shutil.ignore_patterns("*.py", "nsa_kernels")))
    for name in ("config.json", "processor_config.json"):
        values = json.loads((tuned / name).read_text())
        values["auto_map"] = {auto: f"org/VideoNSA--{target}" for auto, target in values["auto_map"].items()}
        (tuned / name).write_text(json.dumps(values))
    hub.seed("someone/Tuned", tuned)
    run(
        f"""
        model, processor = check("someone/Tuned", code={old!r})
        model.save_pretrained("own")
        processor.save_pretrained("own")
        """,
        cache="cache",
    )
    own = tmp_path / "own"
    assert code_files(own) == code_files(checkpoint)
    assert "--" not in (own / "config.json").read_text() + (own / "processor_config.json").read_text()

    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    change_kernels(changed)
    new = hub.seed("org/VideoNSA", changed)
    later = f"""
        check("someone/Tuned", code={old!r}, code_revision={old!r})
        check("someone/Tuned", code={new!r}, same=False)
    """
    run(later, cache="cache")
    run(later, cache="only later")
    hub.stop()
    run(later + f"\n        check({str(own)!r})", cache="cache", offline=True)


def test_f_plain_import(run, checkpoint, tmp_path):
    saved = tmp_path / "saved"
    run(
        f"""
        sys.path.insert(0, "")
        from modeling_videonsa import VideoNSAForConditionalGeneration, nsa_attention
        from processing_videonsa import VideoNSAProcessor

        model = VideoNSAForConditionalGeneration.from_pretrained({str(checkpoint)!r})
        processor = VideoNSAProcessor.from_pretrained({str(checkpoint)!r})
        write_reference(model, processor, "{tmp_path}/plain.safetensors")
        plain, reference = (load_file(f) for f in ("{tmp_path}/plain.safetensors", os.environ["VIDEONSA_REFERENCE"]))
        assert all(torch.equal(plain[name], reference[name]) for name in reference)
        assert nsa_attention.__module__ == "nsa_kernels.attention"
        model.save_pretrained({str(saved)!r})
        processor.save_pretrained({str(saved)!r})
        """,
        cache="unused",
        cwd=ROOT,
    )
    code = code_files(saved)
    assert code == {name: (ROOT / name).read_bytes() for name in code}
    run(f"check({str(saved)!r})", cache="cold")
