"""What must be installed: transformers, torch, numpy, pillow and av, and what these need; nothing else.

An environment is a folder of links to the installed packages: what is not linked is not there, neither its modules nor
its metadata.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_imports

NEEDED = ("transformers", "torch", "numpy", "pillow", "av")
QUESTIONS = json.loads((ROOT / "demo" / "scene.json").read_text())[:2]
HUB_FILES = sorted([*ROOT.glob("*_videonsa.py"), *(ROOT / "nsa_kernels").glob("*.py")])

ANSWER = textwrap.dedent("""
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()


    def ask(question, **media):
        content = [{"type": kind, kind: value} for kind, value in media.items()]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=2)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(tokens, skip_special_tokens=True)


""")


def name_of(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def closure(names) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions that these need, by name."""
    found, todo = {}, [name_of(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # needed on other machines
            continue
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(name_of(requirement.name))
    return found


def tops_of(distribution: importlib.metadata.Distribution) -> set[str]:
    """Top-level files and folders of a distribution."""
    return {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}


def modules_of(distributions: dict[str, importlib.metadata.Distribution]) -> set[str]:
    """Top-level modules of distributions. On Python 3.10 `packages_distributions` knows only those that list theirs."""
    return {top.split(".")[0] for distribution in distributions.values() for top in tops_of(distribution)}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A function that makes an environment of `NEEDED` without some, and runs a program in it."""
    packages = closure(NEEDED)

    def run(program: str, *without: str) -> str:
        folder = tmp_path_factory.mktemp("environment")
        for name, distribution in packages.items():
            for top in tops_of(distribution) if name not in without else ():
                if not (folder / top).exists():
                    (folder / top).symlink_to(distribution.locate_file(top))
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
        variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        start = f"import sys\nsys.path.append({str(folder)!r})\nrepo = {str(ROOT / 'checkpoints' / 'tiny')!r}\n"
        start += f"questions = {[asked['question'] for asked in QUESTIONS]!r}\n"
        start += f"scene = {str(ROOT / 'demo' / 'scene.mp4')!r}\n"
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", start + textwrap.dedent(program)],
            env=variables,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("file", HUB_FILES, ids=lambda file: file.name)
def test_what_transformers_demands(file):
    """By its own scan, which sees imports inside functions too."""
    assert set(get_imports(file)) <= modules_of(closure(NEEDED)) | set(sys.stdlib_module_names)


def test_nothing_else_is_needed(environment):
    """Neither torchvision nor accelerate, nor what the training and the evaluation use; nor triton."""
    program = """
        for name in ("torchvision", "accelerate", "triton", "qwen_vl_utils", "peft", "decord", "pytest"):
            try:
                __import__(name)
            except ImportError:
                continue
            raise SystemExit(f"{name} is there")
        from PIL import Image

        print(type(processor.video_processor).__name__)
        print(ask(questions[0], video=scene))
        print(ask(questions[1], video=open(scene, "rb").read()))
        print(ask("?", image=Image.new("RGB", (56, 56))) is not None)
        frames = [Image.new("RGB", (99, 77), color) for color in ("red", "blue", "red", "blue")]
        print(processor(text="<|video_pad|>", videos=[frames], fps=2)["video_grid_thw"].tolist())
        processor.save_pretrained("saved")
        model.save_pretrained("saved")
        again = AutoProcessor.from_pretrained("saved", trust_remote_code=True)
        print(again.video_processor.to_dict() == processor.video_processor.to_dict())
    """
    lines = environment(ANSWER + textwrap.dedent(program), "triton").splitlines()
    assert lines[0] == "PlainVideoProcessor"
    assert lines[1:] == [*(asked["answer"] for asked in QUESTIONS), "True", "[[2, 2, 4]]", "True"]


def test_without_av(environment):
    """Frames are read, and files are an error that says what is missing."""
    program = """
        import numpy as np

        frames = np.zeros((4, 56, 56, 3), np.uint8)
        print(processor(text="<|video_pad|>", videos=[frames], fps=2)["video_grid_thw"].tolist())
        for video in (scene, open(scene, "rb").read()):
            try:
                ask("?", video=video)
            except ImportError as error:
                print(error)
    """
    lines = environment(ANSWER + textwrap.dedent(program), "av").splitlines()
    assert lines == ["[[2, 4, 4]]"] + ["reading video files needs PyAV: pip install av"] * 2


def test_links_are_an_environment(environment):
    """The test of the tests: a package that is not linked is not there, and an import in a function is demanded."""
    program = """
        import importlib.metadata, importlib.util
        print([importlib.util.find_spec(name) for name in ("torchvision", "av")])
        try:
            importlib.metadata.version("av")
        except importlib.metadata.PackageNotFoundError:
            print("no metadata")
    """
    assert environment(program, "av").splitlines() == ["[None, None]", "no metadata"]


def test_the_scan_sees_imports_in_functions(tmp_path):
    file = Path(tmp_path / "a.py")
    file.write_text("def f():\n    from qwen_vl_utils import vision_process\n")
    assert get_imports(file) == ["qwen_vl_utils"]
