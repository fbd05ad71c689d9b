"""Convert between Qwen2.5-VL and VideoNSA checkpoints, and bring the result to the Hub.

    python convert_weights.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python convert_weights.py Qwen/Qwen2.5-VL-3B-Instruct VideoNSA-3B --gate-init selection --push-to-hub me/VideoNSA-3B
    python convert_weights.py Enxin/VideoNSA VideoNSA-released --revision main --verify
    python convert_weights.py ./my-videonsa ./my-dense-nsa --target qwen2_5_vl --dtype bfloat16 --max-shard-size 2GB

Sources are folders or Hub repositories with safetensors weights. What they hold is detected:

    Qwen2.5-VL           of any size; the gates (`self_attn.g_proj_1`, `self_attn.g_proj_2`) are made:
                         --gate-init half       g_proj_2 is zero, so that every gate starts at sigmoid(0) = 0.5
                         --gate-init selection  the selection gate is exactly 1, the other two are 0 (below 1e-43): on
                                                videos of at most block_counts x block_size tokens this is dense
                                                attention over the vision tokens
    published VideoNSA   model type qwen2_5_vl with gates; becomes nsa_variant "released" without --variant
    own VideoNSA         model type videonsa

each in the key layout of the published checkpoints and of transformers 4.51 (`model.layers.*`, `visual.*`) or in that
of transformers 4.53 and later (`model.language_model.*`, `model.visual.*`). Targets:

    videonsa             loads by itself with `trust_remote_code=True`; in the later layout
    qwen2_5_vl           plain Qwen2.5-VL without gates, for transformers alone; in the published layout

Tensors are copied bit by bit unless `--dtype` asks for a cast, in the shards of the source unless `--max-shard-size`
asks for others. Everything is planned and checked from the headers of the source before a byte is written. Weights are
streamed in pieces of 4 MiB, so memory depends neither on the size of the model nor on that of a shard. The result is
built in `.<name>.partial` beside the output, `config.json` last, and renamed when it is complete and on disk: a crash
at any point leaves no folder under the output's name that is not whole. The same command, run again, goes on after the
last finished shard, whose bytes it checks; another source or other options start over.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
)

from configuration_videonsa import AUTO_MAP, NSA_FIELDS, VideoNSAConfig
from conversion import publishing, safetensors_io
from conversion.companions import CARRIED_FILES, CODE_FOLDER, PROCESSOR, companion_files, converter_version
from conversion.plan import DTYPES, GATE_INITS, TARGETS, VARIANTS, Options, Plan
from conversion.report import describe
from conversion.safetensors_io import (
    PlannedTensor,
    StoredTensor,
    parse_size,
    read_chunks,
    read_json,
    some,
    split_into_shards,
    to_bytes,
)
from conversion.source import Source, open_source
from conversion.staging import check_output, partial_folder
from conversion.verification import compare_logits, compare_tensors
from conversion.writing import byte_bar, is_result, write_checkpoint
from modeling_videonsa import VideoNSAForConditionalGeneration

# First match wins; None drops the tensor. A key that matches nothing is an error.
KEY_TABLE: tuple[tuple[str, str | None], ...] = (
    (r"^.*\.rotary_emb\.inv_freq$", None),  # a buffer that transformers before 4.32 saved; computed from the config
    (r"^model\.(language_model|visual)\.(.+)$", r"model.\1.\2"),
    (r"^visual\.(.+)$", r"model.visual.\1"),
    (r"^model\.(embed_tokens|layers|norm)\.(.+)$", r"model.language_model.\1.\2"),
    (r"^lm_head\.weight$", "lm_head.weight"),
)
# The names above, as the published Qwen2.5-VL checkpoints spell them.
PUBLISHED_KEYS: tuple[tuple[str, str], ...] = (
    (r"^model\.visual\.(.+)$", r"visual.\1"),
    (r"^model\.language_model\.(.+)$", r"model.\1"),
    (r"^(lm_head\.weight)$", r"\1"),
)
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
GATE = re.compile(r"^(.+\.self_attn)\.g_proj_([12])\.(weight|bias)$")
# sigmoid(100) is exactly 1 in float32, sigmoid(-100) is 4e-44.
SATURATED_LOGIT = 100.0

CONFIG_CLASSES = {"videonsa": VideoNSAConfig, "qwen2_5_vl": Qwen2_5_VLConfig}
# Beside `text_config`, transformers 4.52 to 4.56 kept the text fields of a flat configuration, and did not read them.
TEXT_FIELDS = {field.name for field in dataclasses.fields(Qwen2_5_VLTextConfig)} | {"rope_scaling", "rope_theta"}
TEXT_FIELDS -= {field.name for field in dataclasses.fields(Qwen2_5_VLConfig)}
# Of the source's code, and of the machine that saved it.
UNKEPT_FIELDS = ("_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "conversion")
UNKEPT_FIELDS += ("model_type", "transformers_version")
MODEL_CLASSES = {"videonsa": VideoNSAForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SMALL_FILES = ("config.json", "README.md", PROCESSOR, *CARRIED_FILES)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    target: str = "videonsa",
    variant: str | None = None,
    gate_init: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    push_to_hub: str | None = None,
    public: bool = False,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Path:
    """Write a checkpoint made of another one.

    Args:
        source: a checkpoint folder, or the id of a Hub repository: Qwen2.5-VL, published or own VideoNSA weights.
        output: the folder to create.
        revision: branch, tag or commit of a Hub source.
        target: "videonsa", or "qwen2_5_vl" for plain Qwen2.5-VL without gates.
        variant: `nsa_variant` of the result; None means "released" for published VideoNSA weights, what it was for own
            ones, "paper" for Qwen2.5-VL.
        gate_init: of gates that the source does not have: "half" (every gate 0.5, the default) or "selection"
            (selection open, compression and window shut).
        seed: of the random first layer of new gates.
        dtype: "float32", "bfloat16" or "float16" to cast every tensor; None keeps each as it is stored.
        max_shard_size: in bytes, or such as "5GB" (10^9) or "5GiB" (2^30); a larger tensor gets a shard of its own.
            None keeps the shards of the source.
        overwrite: replace an existing checkpoint folder, which stays in place until the new one is complete.
        verify: compare every tensor of the result with the source and, on a small prompt, the logits. The models are
            loaded for that, one at a time.
        push_to_hub: id of a Hub repository to make of the result, with a model card. It is created, private and empty,
            before the work, so that a missing permission shows then.
        public: make that repository public, once all of the result is there.
        base_model: Hub id of what the source is or was made of, for the model card; of a Hub source it is known.
        dry_run: print what would be done, and write nothing (small files of a Hub source come into the Hub cache).
        progress: show a progress bar; None means on a terminal only.
    Returns:
        The output folder. One that exists and is, to the byte, what would be written is not written again where it is
        to be verified or pushed, so that the same command can be repeated after a failed push.
    Raises:
        ValueError: an argument is wrong, the output exists, or the source is not a complete checkpoint of finite
            numbers in safetensors format, or the result differs from it. Nothing has been written.
        OSError: the Hub or the disk failed. There is no output, but for a failed push; the same command goes on.
    """
    options = Options(target, variant, gate_init, seed, dtype, max_shard_size)
    if public and push_to_hub is None:
        raise ValueError("`public` is about the repository of `push_to_hub`, which is None")
    if push_to_hub is not None:
        publishing.check_repo_id("push_to_hub", push_to_hub)
    if base_model is not None:
        publishing.check_repo_id("base_model", base_model)
    output = Path(output).expanduser().resolve()
    reusable = output.exists() and (verify or push_to_hub is not None)
    if not dry_run:
        check_output(output, overwrite or reusable)
    origin = open_source(source, revision, SMALL_FILES)
    for inner, what in ((origin.folder, "the source"), (CODE_FOLDER, "the code of VideoNSA")):
        if inner.is_relative_to(output):
            raise ValueError(f"`output` {output} holds {what}, {inner}: choose another folder")
    plan = make_plan(origin, options, base_model)
    for file in {tensor.source.file for tensor in plan.tensors if tensor.source}:
        if file.resolve().is_relative_to(output):
            raise ValueError(f"`output` {output} holds the source's {file.name}, a link: choose another folder")
    if dry_run:
        print(describe(plan, output))
        return output
    if push_to_hub is not None:
        publishing.open_repository(push_to_hub, public)
    if origin.remote_names is not None:
        with byte_bar("Checking the download", plan.source_bytes, progress) as on_checked:
            origin.fetch_weights(on_checked)
        plan = make_plan(origin, options, base_model)
    if "tokenizer.json" not in plan.files and "vocab.json" not in plan.files:
        warnings.warn(f"{origin} has no tokenizer: add its files to {output} before loading a processor", stacklevel=2)

    check = functools.partial(_verify, plan, progress) if verify else None
    if not (reusable and is_result(output, plan, progress)):
        card_name = push_to_hub or output.name
        write_checkpoint(plan, output, card_name=card_name, overwrite=overwrite, progress=progress, verify=check)
    elif check is not None:
        check(output)
    if push_to_hub is not None:
        publishing.push(output, push_to_hub, public, plan)
    return output


def make_plan(source: Source, options: Options, base_model: str | None = None) -> Plan:
    """Decide what every file of the result holds, from headers and small files alone.

    Raises:
        ValueError: the source is not a complete, unquantised checkpoint of a known kind.
        OSError: the Hub failed.
    """
    values = _read_config(source.folder)
    stored = source.headers()
    has_gates = any(GATE.match(key) for key in stored)
    if values["model_type"] == "videonsa":
        kind = "videonsa"
    else:
        is_published = values.get("architectures") == [VideoNSAForConditionalGeneration.__name__]
        kind = "published" if has_gates or is_published else "qwen2_5_vl"
    if options.gate_init is not None and kind != "qwen2_5_vl":
        raise ValueError(f"`gate_init` = {options.gate_init!r} is for sources without gates; {source} has gates")
    config = build_config(source.folder, kind, options)
    tensors, dropped = plan_tensors(
        stored,
        expected_shapes(config),
        DTYPES.get(options.dtype),
        new_gates=kind == "qwen2_5_vl",
        compare_tied=source.has_weights,
    )
    if options.target == "qwen2_5_vl":
        tensors = [dataclasses.replace(tensor, name=published_key(tensor.name)) for tensor in tensors]
    plan = Plan(
        source,
        options,
        kind,
        config,
        split_into_shards(tensors, options.max_shard_size and parse_size(options.max_shard_size)),
        companion_files(source.folder, options.target),
        tuple(dropped),
        functools.partial(gate_chunks, config=config, gate_init=options.gate_init or GATE_INITS[0], seed=options.seed),
    )
    earlier = values.get("conversion")
    config.conversion = _provenance(plan, earlier if isinstance(earlier, dict) else {}, base_model)
    return plan


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`; a ValueError if it cannot be converted."""
    file = folder / "config.json"
    values = read_json(file)
    if values.get("model_type") not in MODEL_CLASSES:
        raise ValueError(f"{file}: `model_type` must be 'qwen2_5_vl' or 'videonsa', got {values.get('model_type')!r}")
    if "quantization_config" in values:
        raise ValueError(f"{file}: quantised checkpoints (`quantization_config`) cannot be converted")
    return values


def build_config(folder: Path, kind: str, options: Options) -> PreTrainedConfig:
    """The configuration of the result.

    Args:
        folder: of the source, whose config.json may be flat (transformers 4.51), nested, or both (4.52 to 4.56).
        kind: of the source; decides the default variant.
        options: target, variant and dtype.
    Raises:
        ValueError: there is no configuration, it is of another model, quantised or wrong, or the variant does not exist
            for its shape.
    """
    values = _read_config(folder)
    if values.get("text_config") is not None:
        values = {key: value for key, value in values.items() if key not in TEXT_FIELDS}
    try:
        source = CONFIG_CLASSES[values["model_type"]].from_dict(values)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    nested = source.to_diff_dict() | {"text_config": source.text_config.to_dict()}
    for part in (nested, nested["text_config"], nested["vision_config"]):
        for key in UNKEPT_FIELDS:
            part.pop(key, None)
    if options.target == "qwen2_5_vl":
        for part in (nested, nested["text_config"]):  # in `vision_config`, `window_size` is the vision tower's
            for key in NSA_FIELDS:
                part.pop(key, None)
        config = Qwen2_5_VLConfig(**nested)
    else:
        variant = options.variant or ("released" if kind == "published" else None)
        if variant is not None:
            nested.pop("nsa_variant", None)
            nested["text_config"]["nsa_variant"] = variant
        try:
            config = VideoNSAConfig(**nested)
        except ValueError as error:
            hint = "" if options.variant or kind != "published" else "; --variant paper does without that variant"
            raise ValueError(f"{folder / 'config.json'}: {error}{hint}") from error
        config.auto_map = dict(AUTO_MAP)
    config.architectures = [MODEL_CLASSES[options.target].__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = DTYPES.get(options.dtype) or source.dtype
    return config


def _provenance(plan: Plan, earlier: dict[str, Any], base_model: str | None) -> dict[str, Any]:
    """What the result's configuration says of its making, for model cards; nothing that is only true of this machine.

    Args:
        earlier: what the source's configuration says of its own.
        base_model: as in `convert`.
    """
    source, options = plan.source, plan.options
    stated = {
        "base_model": base_model or source.repo_id or earlier.get("base_model"),
        "source": source.repo_id,
        "source_commit": source.commit,
        "source_kind": plan.source_kind,
        "dtype": options.dtype,
        "gate_init": plan.gate_init if plan.new_gates else None,
        "seed": options.seed if plan.new_gates else None,
        "gates_dropped": any(GATE.match(key) for key in plan.dropped) or None,
    }
    license_fields = source.license() or {key: value for key, value in earlier.items() if key.startswith("license")}
    stated |= license_fields | converter_version()
    return {key: value for key, value in stated.items() if value is not None}


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a model of this configuration has, in its order."""
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def plan_tensors(
    stored: dict[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
    *,
    new_gates: bool,
    compare_tied: bool = True,
) -> tuple[list[PlannedTensor], list[str]]:
    """Find the source of every expected tensor.

    Args:
        stored: what the source holds, by its key.
        expected: names and shapes of the result.
        dtype: cast to this; None keeps. New gates have the dtype of their layer's query projection.
        new_gates: expected gates are made, not found.
        compare_tied: the bytes are here, so that a tied output head can be compared with the embeddings.
    Returns:
        The tensors, in the order of `expected`, and the keys of the source that are left out.
    Raises:
        ValueError: keys that are unknown, missing or twice there, wrong shapes, an output head that differs from the
            embeddings it is tied to.
    """
    sources: dict[str, StoredTensor] = {}
    unknown, dropped = [], []
    for key, tensor in stored.items():
        name = rename(key)
        is_left_out = name is None or (GATE.match(name) and not any(map(GATE.match, expected)))
        if name == HEAD and HEAD not in expected:
            _check_tied(tensor, stored, compare_tied)
            is_left_out = True
        if is_left_out:
            dropped.append(key)
            continue
        if name not in expected:
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
    if missing := [name for name in expected if name not in sources and not (new_gates and GATE.match(name))]:
        raise ValueError(f"the source lacks {some(missing)}")

    planned = []
    for name, shape in expected.items():
        source = sources.get(name)
        like = source or sources[f"{GATE.match(name)[1]}.q_proj.weight"]
        planned.append(PlannedTensor(name, dtype or like.dtype, shape, source, like.file))
    return planned, dropped


def rename(key: str) -> str | None:
    """The model's name of the source's `key`; None if it is dropped.

    Raises:
        ValueError: no entry of `KEY_TABLE` matches.
    """
    for pattern, replacement in KEY_TABLE:
        if match := re.match(pattern, key):
            return None if replacement is None else match.expand(replacement)
    raise ValueError(f"unknown tensor in the source: {key!r}")


def published_key(name: str) -> str:
    """How the published Qwen2.5-VL checkpoints spell a name of the model."""
    return next(match.expand(key) for pattern, key in PUBLISHED_KEYS if (match := re.match(pattern, name)))


def _check_tied(head: StoredTensor, stored: dict[str, StoredTensor], compare: bool) -> None:
    """A tied head adds nothing to a checkpoint; one that differs says that the configuration is wrong."""
    embedding = next((tensor for key, tensor in stored.items() if rename(key) == EMBEDDING), None)
    same = embedding is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and compare:
        same = all(a == b for a, b in zip(read_chunks(head), read_chunks(embedding), strict=True))
    if not same:
        raise ValueError(f"{head.file}: `tie_word_embeddings` is true but {head.key!r} differs from the embeddings")


def gate_chunks(tensor: PlannedTensor, *, config: VideoNSAConfig, gate_init: str, seed: int) -> Iterator[bytes]:
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


def _verify(plan: Plan, progress: bool | None, folder: Path) -> None:
    """Reload the result and compare it with its source: every tensor, and the logits of a small prompt.

    The source is loaded by transformers itself, with its own renaming of keys. Both models have the result's dtype, and
    the logits are to be equal to the last bit: of dense attention, at equal positions, and, where the gates come from
    the source, of sparse attention too.
    """
    with byte_bar("Verifying", plan.nbytes, progress) as on_compared:
        compare_tensors(folder, plan.tensors, plan.to_chunks, on_compared)
    has_gates = plan.source_kind != "qwen2_5_vl"
    target = "videonsa" if has_gates else "qwen2_5_vl"
    variant = plan.options.variant if plan.options.target == "videonsa" else "paper"  # of no matter to dense attention
    config = build_config(plan.source.folder, plan.source_kind, Options(target, variant if has_gates else None))
    dtype = plan.config.dtype or plan.tensors[0].dtype
    modes = ("dense", "sparse") if has_gates and plan.options.target == "videonsa" else ("dense",)
    compare_logits(
        functools.partial(_load, MODEL_CLASSES[target], plan.source.folder, config=config, dtype=dtype),
        functools.partial(_load, MODEL_CLASSES[plan.options.target], folder, dtype=dtype),
        modes,
    )
    print(
        f"Verified: {len(plan.tensors)} tensors are what the source makes them, and the logits of a small prompt are "
        f"equal to the last bit ({' and '.join(modes)} attention)",
        file=sys.stderr,
    )


def _load(model_class: type[PreTrainedModel], folder: Path, **kwargs) -> PreTrainedModel:
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    if wrong := [key for keys in info.values() for key in keys]:
        raise ValueError(f"{folder} does not load completely: {some(sorted(map(str, wrong)))}")
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="The module's docstring says more: sources, gates, safety."
    )
    add = parser.add_argument
    add("source", help="checkpoint folder or Hub id: Qwen2.5-VL, published or own VideoNSA weights")
    add("output", type=Path, help="folder to create")
    add("--revision", help="branch, tag or commit of a Hub source")
    add("--target", choices=TARGETS, default="videonsa", help="model type of the result (%(default)s)")
    add("--variant", choices=VARIANTS, help="nsa_variant of the result (released for published VideoNSA weights)")
    add("--gate-init", choices=GATE_INITS, help="state of new gates (half)")
    add("--seed", type=int, default=0, help="of the random first layer of new gates (%(default)s)")
    add("--dtype", choices=DTYPES, help="cast every tensor (default: keep)")
    add("--max-shard-size", help="such as 500MB or 2GiB (default: the shards of the source)")
    add("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    add("--verify", action="store_true", help="compare all tensors and logits with the source; loads the models")
    add("--push-to-hub", metavar="ORG/NAME", help="make a private Hub repository of the result, with a model card")
    add("--public", action="store_true", help="make that repository public")
    add("--base-model", metavar="ORG/NAME", help="Hub id of what a local source is, for the model card")
    add("--dry-run", action="store_true", help="print keys, sizes and shards; write nothing")
    arguments = vars(parser.parse_args())
    try:
        output = convert(**arguments)
        if not arguments["dry_run"]:
            print(output)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        message = f"convert_weights.py: error: {error or 'interrupted'}"
        partial = partial_folder(arguments["output"].expanduser().resolve())
        if partial.exists() and not isinstance(error, ValueError):
            message += f"\nFinished shards are kept in {partial}: the same command goes on from there."
        raise SystemExit(message) from error


if __name__ == "__main__":
    main()
