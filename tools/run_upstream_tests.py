"""Run transformers' own tests of models on VideoNSA, and on Qwen2.5-VL for comparison; print what only we fail.

    .venv/bin/python tools/run_upstream_tests.py [-k EXPRESSION] [--output FILE]

The tests are those in the source distribution of the installed transformers, which pip downloads; of its mixins, the
source distribution leaves out those for generation and for export. Exits with 1 if VideoNSA fails a test that
Qwen2.5-VL passes, other than those in `EXPECTED`. Nothing of the distribution stays.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# Test -> why VideoNSA does otherwise.
_NO_WEIGHTS = "sparse attention has no attention weights over all keys, and says so"
EXPECTED = {
    "test_attention_outputs": _NO_WEIGHTS,
    "test_capture_outputs_decorator": _NO_WEIGHTS,
    "test_model_outputs_equivalence": _NO_WEIGHTS,
    "test_retain_grad_hidden_states_attentions": _NO_WEIGHTS,
}
# Mixins that tests import and the source distribution has not.
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def download(folder: Path) -> Path:
    """The folder of tests of the installed transformers."""
    name = f"transformers=={version('transformers')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", name]
    subprocess.run([*pip, "-d", str(folder)], check=True)
    archive = next(folder.glob("transformers-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
    for path, text in MISSING.items():
        if not (tests / path).exists():
            (tests / path).parent.mkdir(exist_ok=True)
            (tests / path).write_text(text)
            (tests / path).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("upstream_models.py"), tests / "test_upstream_models.py")
    return tests


def run(tests: Path, expression: str) -> dict[str, dict[str, str]]:
    """Outcomes by test and class: "passed", "skipped", or the first line of the error."""
    report = tests.parent / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=line"]
    command += [
        f"--junitxml={report}",
        "--rootdir",
        str(tests.parent),
        "-c",
        os.devnull,
        "tests/test_upstream_models.py",
        "-k",
        expression,
    ]
    environment = os.environ | {"VIDEONSA": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tests.parent, env=environment)
    outcomes: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        if problem is not None:
            outcome = (problem.get("message") or problem.text or "failed").splitlines()[0][:300]
        own = outcomes.setdefault(case.get("name"), {})
        name = case.get("classname").rsplit(".", 1)[1]
        if own.get(name, "passed") in ("passed", "skipped"):  # of a test's subtests, one that failed counts
            own[name] = outcome
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="expression", default="test", help="of pytest, to run fewer tests")
    parser.add_argument("--output", type=Path, help="where to write all outcomes, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(download(Path(folder)), arguments.expression)
    fine = ("passed", "skipped")
    unexpected = []
    for model in ("StockTest", "VideoNSATest", "VideoNSADenseTest"):
        passed, skipped = (sum(one.get(model) == outcome for one in outcomes.values()) for outcome in fine)
        print(f"{model}: {passed} passed, {skipped} skipped, {len(outcomes) - passed - skipped} failed")
        for name, one in sorted(outcomes.items()):
            if one.get(model) not in fine and one.get("StockTest") in fine:
                reason = EXPECTED.get(name)
                print(f"    {name}, which Qwen2.5-VL passes: {one.get(model)}\n        {reason or 'NOT EXPECTED'}")
                unexpected += [] if reason else [name]
        if not passed:
            unexpected.append(f"nothing of {model} was run")
    if arguments.output:
        result = {"transformers": version("transformers"), "torch": version("torch"), "outcomes": outcomes}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
