"""Everything in a checkpoint folder besides weights and `config.json`: tokenizer, processor, chat template, code."""

import contextlib
import functools
import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .safetensors_io import read_json

CODE_FOLDER = Path(__file__).resolve().parent.parent
# What they import of this repository comes with them.
CODE_FILES = ("configuration_videonsa.py", "modeling_videonsa.py", "processing_videonsa.py")

# Files taken over from the source as they are; what else the source holds (its model card, other weight formats,
# remote code) describes the source, not the result.
CARRIED_FILES = (
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
PROCESSOR = "processor_config.json"
# Those of them in which transformers notes the processor's class, and where its code lies.
_NAMING_FILES = ("preprocessor_config.json", "tokenizer_config.json", "video_preprocessor_config.json")
_PROCESSOR_CLASSES = {"videonsa": "VideoNSAProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
_SECTIONS = ("image_processor", "video_processor")


def companion_files(folder: Path, target: str) -> dict[str, bytes]:
    """Every file of the result besides weights, `config.json` and model card, by its path in the result.

    Args:
        folder: of the source.
        target: model type of the result; "videonsa" brings its code along.
    Raises:
        ValueError: one of them is not the JSON object that its name promises.
    """
    paths = [path for pattern in CARRIED_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in paths:
        if path.suffix == ".json":
            read_json(path)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for name in _NAMING_FILES:
        if name in files:
            before = read_json(folder / name)
            after = _without_remote_processor(before)
            if before.get("processor_class") == _PROCESSOR_CLASSES["videonsa"]:
                after["processor_class"] = _PROCESSOR_CLASSES[target]
            if after != before:
                files[name] = to_json(after)
    files[PROCESSOR] = to_json(_processor_config(folder, target))
    if not {"chat_template.jinja", "chat_template.json"} & files.keys():
        files["chat_template.jinja"] = (CODE_FOLDER / "chat_template.jinja").read_bytes()
    return files | (code_files() if target == "videonsa" else {})


def code_files() -> dict[str, bytes]:
    """The code that a VideoNSA checkpoint is loaded with."""
    code = {CODE_FOLDER / "nsa_kernels" / "__init__.py"}
    for name in CODE_FILES:
        code |= {CODE_FOLDER / name, *map(Path, get_relative_import_files(CODE_FOLDER / name))}
    return {path.relative_to(CODE_FOLDER).as_posix(): path.read_bytes() for path in sorted(code)}


def _processor_config(folder: Path, target: str) -> dict:
    """The processor's configuration, with the image and video settings of the source where it has any."""
    ours = read_json(CODE_FOLDER / PROCESSOR)
    theirs = read_json(folder / PROCESSOR) if (folder / PROCESSOR).exists() else {}
    own_fields = ours.keys() - {*_SECTIONS, "processor_class"}
    # Before transformers 5 the sections had files of their own, which are read where the sections are absent.
    if theirs or (folder / "preprocessor_config.json").exists():
        ours = {key: value for key, value in ours.items() if key not in _SECTIONS}
    merged = ours | theirs | {"auto_map": ours["auto_map"], "processor_class": _PROCESSOR_CLASSES[target]}
    merged |= {key: _without_remote_processor(merged[key]) for key in _SECTIONS if isinstance(merged.get(key), dict)}
    return {key: value for key, value in merged.items() if target == "videonsa" or key not in own_fields}


def _without_remote_processor(values: dict) -> dict:
    """Without the code of VideoNSA's processor, which may be in another repository; processor_config.json names it."""
    auto_map = {name: code for name, code in (values.get("auto_map") or {}).items() if name != "AutoProcessor"}
    return {key: value for key, value in values.items() if key != "auto_map"} | (
        {"auto_map": auto_map} if auto_map else {}
    )


@functools.cache
def converter_version() -> dict[str, str]:
    """Version of this code, and its commit where this is a git checkout; "-dirty" marks uncommitted changes."""
    found = {}
    project = CODE_FOLDER / "pyproject.toml"
    if project.exists() and (match := re.search(r'^version = "(.+)"$', project.read_text(), re.MULTILINE)):
        found["converter_version"] = match[1]
    else:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["converter_version"] = importlib.metadata.version("videonsa")
    if (CODE_FOLDER / ".git").exists():
        command = ["git", "-C", str(CODE_FOLDER), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            found["converter_commit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, or another user's checkout
            pass
    return found


def to_json(values: dict) -> bytes:
    """As transformers writes its configurations."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
