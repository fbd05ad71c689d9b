"""Convert a Qwen2.5-VL checkpoint into a VideoNSA checkpoint that loads by itself with `trust_remote_code=True`.

    python convert_weights.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python convert_weights.py Qwen/Qwen2.5-VL-3B-Instruct VideoNSA-3B --revision main --gate-init selection
    python convert_weights.py ./my-finetune ./my-videonsa --dtype bfloat16 --max-shard-size 2GB --overwrite

Sources are folders or Hub repositories with safetensors weights of any Qwen2.5-VL size, in the key layout of the
published checkpoints (`model.layers.*`, `visual.*`) or in that of transformers 5 (`model.language_model.*`,
`model.visual.*`); the result has the latter. Every tensor of the source is copied bit by bit unless `--dtype` asks for
a cast; only the gates (`self_attn.g_proj_1`, `self_attn.g_proj_2`) are new:

    --gate-init half       g_proj_2 is zero, so that every gate starts at sigmoid(0) = 0.5
    --gate-init selection  the selection gate is exactly 1, the other two are 0 (below 1e-43): on videos of at most
                           block_counts x block_size tokens this is dense attention over the vision tokens

Everything is planned and checked from the headers of the source before a byte is written. Weights are streamed in
pieces of 16 MiB, so memory depends neither on the size of the model nor on that of a shard. The result is built in
`.<name>.partial` beside the output, `config.json` last, and renamed when it is complete and on disk: a crash at any
point leaves no folder that looks like a checkpoint and is not one. The next run clears what a crash left.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError, StrictDataclassError
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig
from transformers.dynamic_module_utils import get_relative_import_files

from configuration_videonsa import AUTO_MAP, VideoNSAConfig
from conversion import safetensors_io
from conversion.safetensors_io import (
    INDEX,
    PlannedTensor,
    StoredTensor,
    cast_chunks,
    read_chunks,
    read_headers,
    read_json,
    some,
    split_into_shards,
    to_bytes,
    write_tensors,
)
from conversion.staging import check_output, staged, write_file
from modeling_videonsa import VideoNSAForConditionalGeneration

CODE_FOLDER = Path(__file__).resolve().parent
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

# First match wins; None drops the tensor. A key that matches nothing is an error.
KEY_TABLE: tuple[tuple[str, str | None], ...] = (
    (r"^.*\.rotary_emb\.inv_freq$", None),  # a buffer that transformers before 4.32 saved; computed from the config
    (r"^model\.(language_model|visual)\.(.+)$", r"model.\1.\2"),
    (r"^visual\.(.+)$", r"model.visual.\1"),
    (r"^model\.(embed_tokens|layers|norm)\.(.+)$", r"model.language_model.\1.\2"),
    (r"^lm_head\.weight$", "lm_head.weight"),
)
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
GATE = re.compile(r"^(.+\.self_attn)\.g_proj_([12])\.(weight|bias)$")
GATE_INITS = ("half", "selection")
# sigmoid(100) is exactly 1 in float32, sigmoid(-100) is 4e-44.
SATURATED_LOGIT = 100.0

TARGET_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    gate_init: str = "half",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write a VideoNSA checkpoint made of a Qwen2.5-VL checkpoint.

    Args:
        source: a checkpoint folder, or the id of a Hub repository.
        output: the folder to create.
        revision: branch, tag or commit of a Hub source.
        gate_init: "half" (every gate 0.5) or "selection" (selection open, compression and window shut).
        seed: of the random first layer of the gates.
        dtype: "float32", "bfloat16" or "float16" to cast every tensor; None keeps each as it is stored.
        max_shard_size: in bytes, or such as "5GB" (10^9) or "5GiB" (2^30); a larger tensor gets a shard of its own.
        overwrite: replace an existing checkpoint folder, which stays in place until the new one is complete.
        progress: show a progress bar; None means on a terminal only.
    Returns:
        The output folder.
    Raises:
        ValueError: an argument is wrong, the output exists, or the source is not a complete Qwen2.5-VL checkpoint in
            safetensors format. Nothing has been written, except where a cast overflows.
        OSError: the Hub or the disk failed. No output remains.
    """
    if gate_init not in GATE_INITS:
        raise ValueError(f"`gate_init` must be one of {', '.join(GATE_INITS)}, got {gate_init!r}")
    if dtype is not None and dtype not in TARGET_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(TARGET_DTYPES)}, got {dtype!r}")
    shard_bytes = parse_size(max_shard_size)
    output = Path(output).expanduser().resolve()
    check_output(output, overwrite)
    folder = _source_folder(source, revision)
    for inner, what in ((folder, "the source"), (CODE_FOLDER, "the code of VideoNSA")):
        if inner.is_relative_to(output):
            raise ValueError(f"`output` {output} holds {what}, {inner}: choose another folder")

    config = build_config(folder, TARGET_DTYPES.get(dtype))
    expected = expected_shapes(config)
    plan = plan_tensors(read_headers(folder), expected, TARGET_DTYPES.get(dtype))
    shards = split_into_shards(plan, shard_bytes)
    carried = _carried_files(folder)

    total = sum(tensor.nbytes for tensor in plan)
    free = shutil.disk_usage(next(parent for parent in output.parents if parent.exists())).free
    if total > free:
        raise ValueError(f"`output` {output} needs {total:,} bytes, its disk has {free:,} free")

    def to_chunks(tensor: PlannedTensor) -> Iterator[bytes]:
        if tensor.source is None:
            return gate_chunks(tensor, config, gate_init=gate_init, seed=seed)
        return read_chunks(tensor.source) if tensor.dtype == tensor.source.dtype else cast_chunks(tensor)

    # tqdm's `disable`: None means off unless standard error is a terminal.
    bar_off = None if progress is None else not progress
    with staged(output, overwrite) as staging:
        with tqdm(total=total, desc=f"Writing {output.name}", unit="B", unit_scale=True, disable=bar_off) as bar:
            for file, tensors in shards.items():
                write_tensors(staging / file, tensors, to_chunks, bar.update)
        for name, data in carried.items():
            write_file(staging / name, data)
        if len(shards) > 1:
            parameters = sum(math.prod(tensor.shape) for tensor in plan)
            weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
            write_file(staging / INDEX, _to_json(index))
        verify(staging, expected)
        write_file(staging / "config.json", config.to_json_string().encode())
    return output


def build_config(folder: Path, dtype: torch.dtype | None = None) -> VideoNSAConfig:
    """The VideoNSA configuration that corresponds to the Qwen2.5-VL configuration in `folder`, flat or nested.

    Args:
        folder: holds the config.json.
        dtype: of the weights to be; None keeps what the configuration says.
    Raises:
        ValueError: there is no configuration, or it is not that of an unquantised Qwen2.5-VL.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "qwen2_5_vl":
        raise ValueError(
            f"{folder / 'config.json'}: `model_type` must be 'qwen2_5_vl', got {values.get('model_type')!r}"
        )
    if "quantization_config" in values:
        raise ValueError(f"{folder / 'config.json'}: quantised checkpoints (`quantization_config`) cannot be converted")
    try:
        qwen = Qwen2_5_VLConfig.from_dict(values)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    nested = qwen.to_diff_dict() | {"text_config": qwen.text_config.to_dict()}
    for part in (nested, nested["text_config"]):
        for key in ("architectures", "auto_map", "model_type", "transformers_version"):
            part.pop(key, None)
    config = VideoNSAConfig(**nested)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype or qwen.dtype
    config.architectures = [VideoNSAForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    return config


def expected_shapes(config: VideoNSAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors a checkpoint of this configuration holds, in the order of the model."""
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def plan_tensors(
    stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], dtype: torch.dtype | None = None
) -> list[PlannedTensor]:
    """Find the source of every expected tensor.

    Args:
        stored: what the source holds, by its key.
        expected: names and shapes of the result.
        dtype: cast to this; None keeps. Gates have the dtype of their layer's query projection.
    Raises:
        ValueError: keys that are unknown, missing or twice there, wrong shapes, an output head that differs from the
            embeddings it is tied to.
    """
    sources: dict[str, StoredTensor] = {}
    unknown = []
    for key, tensor in stored.items():
        name = rename(key)
        if name is None:
            continue
        if name == HEAD and HEAD not in expected:
            _check_tied(tensor, stored)
            continue
        if name not in expected or GATE.match(name):
            unknown.append(key)
            continue
        if name in sources:
            raise ValueError(f"{key!r} and {sources[name].key!r} are both {name!r}")
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{tensor.file}: {key!r} has shape {tensor.shape}, the configuration wants {expected[name]}"
            )
        sources[name] = tensor
    if unknown:
        raise ValueError(f"unknown tensors in the source: {some(unknown)}")
    if missing := [name for name in expected if name not in sources and not GATE.match(name)]:
        raise ValueError(f"the source lacks {some(missing)}")

    def target_dtype(name: str) -> torch.dtype:
        gate = GATE.match(name)
        return dtype or sources[f"{gate[1]}.q_proj.weight" if gate else name].dtype

    return [PlannedTensor(name, target_dtype(name), shape, sources.get(name)) for name, shape in expected.items()]


def rename(key: str) -> str | None:
    """The name in the result of the source's `key`; None if it is dropped.

    Raises:
        ValueError: no entry of `KEY_TABLE` matches.
    """
    for pattern, replacement in KEY_TABLE:
        if match := re.match(pattern, key):
            return None if replacement is None else match.expand(replacement)
    raise ValueError(f"unknown tensor in the source: {key!r}")


def _check_tied(head: StoredTensor, stored: dict[str, StoredTensor]) -> None:
    """A tied head adds nothing to a checkpoint; one that differs says that the configuration is wrong."""
    embedding = next((tensor for key, tensor in stored.items() if rename(key) == EMBEDDING), None)
    if embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        same = False
    else:
        same = all(a == b for a, b in zip(read_chunks(head), read_chunks(embedding), strict=True))
    if not same:
        raise ValueError(f"{head.file}: `tie_word_embeddings` is true but {head.key!r} differs from the embeddings")


def gate_chunks(tensor: PlannedTensor, config: VideoNSAConfig, *, gate_init: str, seed: int) -> Iterator[bytes]:
    """The bytes of an initialised gate tensor.

    The first layer is random with the configuration's `initializer_range`, from a generator of its own: it depends on
    `seed` and on the name alone, not on the shards. The second layer's weight is zero; its bias sets the gates.
    """
    _, layer, kind = GATE.match(tensor.name).groups()
    if (layer, kind) == ("2", "bias"):
        logits = torch.zeros(tensor.shape[0] // 3, 3)  # [H, (cmp, slc, swa)]
        if gate_init == "selection":
            logits += SATURATED_LOGIT * config.text_config.gate_temperature * torch.tensor([-1.0, 1.0, -1.0])
        yield to_bytes(logits.to(tensor.dtype))
        return
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()[:8], "little"))
    left = math.prod(tensor.shape)
    while left:
        values = torch.zeros(min(left, safetensors_io.CHUNK_BYTES // 8))
        if (layer, kind) == ("1", "weight"):
            values.normal_(std=config.text_config.initializer_range, generator=generator)
        left -= values.numel()
        yield to_bytes(values.to(tensor.dtype))


def verify(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Check that the weights in `folder` are, by their headers, exactly the expected ones.

    Raises:
        ValueError: they are not.
    """
    found = {key: tensor.shape for key, tensor in read_headers(folder).items()}
    if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        raise ValueError(f"{folder}: the written tensors are not the model's: {some(wrong)}")


def parse_size(size: int | str) -> int:
    """Bytes of an integer or of a text such as "500MB" (10^6) or "2GiB" (2^30).

    Raises:
        ValueError: not a size, or not positive.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    number = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if number < 1:
        raise ValueError(f"`max_shard_size` must be a positive number of bytes or such as '5GB', got {size!r}")
    return number


def _source_folder(source: str | Path, revision: str | None) -> Path:
    """The local folder of `source`; files of a Hub repository are brought into the Hub cache first."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` {revision!r} is for Hub repositories; `source` {folder} is a folder")
        return folder.resolve()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"`source` {str(source)!r} is neither a folder nor the id of a Hub repository")
    small = ["config.json", INDEX, "pytorch_model.bin.index.json", "processor_config.json", *CARRIED_FILES]
    try:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=small))
    except RepositoryNotFoundError as error:
        raise ValueError(f"`source` {str(source)!r} is neither a folder nor a repository on the Hub") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} does not exist in {str(source)!r}") from error
    build_config(folder)  # a wrong repository is told apart before gigabytes are fetched
    # The commit, not the revision: a branch may move between the two downloads.
    return Path(snapshot_download(str(source), revision=folder.name, allow_patterns=[*small, "*.safetensors"]))


def _carried_files(folder: Path) -> dict[str, bytes]:
    """Every file of the result besides weights and `config.json`, by its path in the result."""
    paths = [path for pattern in CARRIED_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    files["processor_config.json"] = _to_json(_processor_config(folder))
    if not {"chat_template.jinja", "chat_template.json"} & files.keys():
        files["chat_template.jinja"] = (CODE_FOLDER / "chat_template.jinja").read_bytes()
    code = {CODE_FOLDER / "nsa_kernels" / "__init__.py"}
    for name in CODE_FILES:
        code |= {CODE_FOLDER / name, *map(Path, get_relative_import_files(CODE_FOLDER / name))}
    return files | {path.relative_to(CODE_FOLDER).as_posix(): path.read_bytes() for path in sorted(code)}


def _processor_config(folder: Path) -> dict:
    """VideoNSA's processor configuration, with the image and video settings of the source where it has any."""
    ours = read_json(CODE_FOLDER / "processor_config.json")
    file = folder / "processor_config.json"
    theirs = read_json(file) if file.exists() else {}
    # Before transformers 5 these settings had a file of their own, which is read where the sections are absent.
    if theirs or (folder / "preprocessor_config.json").exists():
        ours = {key: value for key, value in ours.items() if key not in ("image_processor", "video_processor")}
    return theirs | ours


def _to_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="The module's docstring says more: sources, gates, safety."
    )
    parser.add_argument("source", help="Qwen2.5-VL checkpoint folder or Hub id")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub source")
    parser.add_argument("--gate-init", choices=GATE_INITS, default="half", help="state of the new gates (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the gates' random first layer (%(default)s)")
    parser.add_argument("--dtype", choices=TARGET_DTYPES, help="cast every tensor (default: keep)")
    parser.add_argument("--max-shard-size", default="5GB", help="such as 500MB or 2GiB (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    arguments = vars(parser.parse_args())
    try:
        print(convert(**arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert_weights.py: error: {error}") from error


if __name__ == "__main__":
    main()
