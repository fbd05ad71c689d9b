"""What the converter refuses, and that nothing is lost then."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert_weights
from checkpoints import damage_tensors, edit_json, first_shard, load_all, rewrite_header, snapshot
from convert_weights import convert

NORM = "model.language_model.norm.weight"


def poison(tensors: dict[str, torch.Tensor], value: float, dtype: torch.dtype = torch.float32) -> None:
    tensors[NORM] = tensors[NORM].to(dtype)
    tensors[NORM][-1] = value


DAMAGES = {
    "unknown key": (lambda f: damage_tensors(f, lambda t: t.update(extra=torch.ones(1))), "unknown tensor.*'extra'"),
    "key of a layer too many": (
        lambda f: damage_tensors(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)})),
        r"unknown tensors.*'model\.layers\.2\.mlp\.up_proj\.weight'",
    ),
    "missing key": (lambda f: damage_tensors(f, lambda t: t.pop(NORM)), f"lacks '{NORM}'"),
    "the same tensor in both layouts": (
        lambda f: damage_tensors(f, lambda t: t.update({"model.norm.weight": t[NORM].clone()})),
        "are both 'model.language_model.norm.weight'",
    ),
    "wrong shape": (
        lambda f: damage_tensors(f, lambda t: t.update({NORM: torch.ones(63)})),
        rf"'{NORM}' has shape \(63,\), the configuration wants \(64,\)",
    ),
    "integer dtype": (
        lambda f: damage_tensors(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
        f"'{NORM}' has dtype I32",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), r"lacks 'model-00001-of-\d+\.safetensors'"),
    "truncated shard": (lambda f: os.truncate(first_shard(f), 5000), r"model-00001-of-\d+\.safetensors is truncated"),
    "shard of 3 bytes": (lambda f: os.truncate(first_shard(f), 3), r"model-00001.*is truncated or not a safetensors"),
    "shard with a tail": (
        lambda f: first_shard(f).open("ab").write(b"x"),
        r"model-00001-of-\d+\.safetensors is truncated or corrupt",
    ),
    "header not JSON": (
        lambda f: first_shard(f).write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        "model-00001.*corrupt safetensors header",
    ),
    "header without shape": (
        lambda f: rewrite_header(
            first_shard(f), lambda h: next(iter(h.values())).pop("shape", h.clear() or h.update(x={}))
        ),
        "model-00001.*corrupt safetensors header",
    ),
    "header with three offsets": (
        lambda f: rewrite_header(first_shard(f), lambda h: list(h.values())[-1].update(data_offsets=[0, 1, 2])),
        "model-00001.*corrupt safetensors header",
    ),
    "header of an infinite size": (
        lambda f: rewrite_header(first_shard(f), lambda h: list(h.values())[-1].update(shape=[float("inf")])),
        "model-00001.*corrupt safetensors header",
    ),
    "header of 2 GB": (
        lambda f: (
            first_shard(f).write_bytes((2 * 10**9).to_bytes(8, "little")),
            os.truncate(first_shard(f), 2 * 10**9 + 8),
        ),
        "model-00001.*is truncated or not a safetensors file: .* header of 2000000000",
    ),
    "header without an end": (
        lambda f: first_shard(f).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "model-00001.*corrupt safetensors header",
    ),
    "wrong offsets": (
        lambda f: rewrite_header(first_shard(f), lambda h: list(h.values())[-1].update(shape=[7])),
        "lies at bytes .* and 28 bytes",
    ),
    "index names another shard": (
        lambda f: rewrite_header(first_shard(f), lambda h: h.update({"other": h.popitem()[1]})),
        "holds 'other', which .* places in None",
    ),
    "index lists an absent tensor": (
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            weight_map=json.loads((f / "model.safetensors.index.json").read_text())["weight_map"]
            | {"absent": first_shard(f).name},
        ),
        "lists tensors that their shards do not hold: 'absent'",
    ),
    "index leaves the folder": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={NORM: "../model.safetensors"}),
        r"file names in the same folder, got '\.\./model\.safetensors'",
    ),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "`weight_map` must be"),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is not valid JSON"),
    "index and single file": (lambda f: (f / "model.safetensors").touch(), "holds both"),
    "pickles only": (
        lambda f: [p.rename(p.with_name("pytorch_model.bin")) for p in f.glob("model*")],
        r"holds neither.*pickled weights \('pytorch_model\.bin'\) are not read",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"lacks config\.json"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "truncated tokenizer": (
        lambda f: os.truncate(f / "tokenizer.json", 1000),
        r"tokenizer\.json is not valid JSON",
    ),
    "truncated generation config": (
        lambda f: os.truncate(f / "generation_config.json", 10),
        r"generation_config\.json is not valid JSON",
    ),
    "another model": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "`model_type` must be 'qwen2_5_vl' or 'videonsa', got 'llama'",
    ),
    "configuration of a wrong type": (
        lambda f: edit_json(f / "config.json", image_token_id="many"),
        r"config\.json: .*image_token_id",
    ),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "`quantization_config`"),
    "NaN": (lambda f: damage_tensors(f, lambda t: poison(t, math.nan)), f"'{NORM}' holds NaN or infinite values"),
    "infinity": (lambda f: damage_tensors(f, lambda t: poison(t, -math.inf)), f"'{NORM}' holds NaN or infinite values"),
    "NaN in bfloat16": (
        lambda f: damage_tensors(f, lambda t: poison(t, math.nan, torch.bfloat16)),
        f"'{NORM}' holds NaN or infinite values",
    ),
    "tied but different head": (
        lambda f: edit_json(f / "config.json", tie_word_embeddings=True),
        "`tie_word_embeddings` is true but 'lm_head.weight' differs",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_before_anything_is_written(damage, source, tmp_path):
    action, message = DAMAGES[damage]
    action(source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tied_head_that_equals_the_embeddings_is_left_out(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old tied"], tmp_path / "source"))
    damage_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert (
        load_all(convert(source, tmp_path / "out")).keys()
        == load_all(convert(pristine["old tied"], tmp_path / "plain")).keys()
    )


def test_rotary_buffers_of_old_checkpoints_are_dropped(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    damage_tensors(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not [key for key in load_all(convert(source, tmp_path / "out")) if "inv_freq" in key]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gate_init": "open"}, "`gate_init` must be one of half, selection, got 'open'"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"max_shard_size": "big"}, "`max_shard_size` .* got 'big'"),
        ({"target": "llava"}, "`target` must be one of videonsa, qwen2_5_vl, got 'llava'"),
        ({"variant": "fast"}, "`variant` must be one of paper, released, got 'fast'"),
        ({"target": "qwen2_5_vl", "variant": "paper"}, "`variant` = 'paper' is for `target` 'videonsa'"),
        ({"target": "qwen2_5_vl", "gate_init": "half"}, "`gate_init` = 'half' is for `target` 'videonsa'"),
        ({"push_to_hub": "me"}, "`push_to_hub` must be the id of a Hub repository such as 'org/name', got 'me'"),
        ({"base_model": "a/b/c"}, "`base_model` must be the id of a Hub repository such as 'org/name', got 'a/b/c'"),
        ({"public": True}, "`public` is about the repository of `push_to_hub`, which is None"),
        ({"revision": "main"}, "`revision` 'main' is for Hub repositories"),
        ({"source": "./no-such-folder"}, "`source` './no-such-folder' is neither a folder nor the id"),
        ({"source": "no-such-folder"}, "`source` 'no-such-folder' is neither a folder nor the id"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, pristine, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(**{"source": pristine["old"], "output": tmp_path / "out"} | arguments)
    assert not list(tmp_path.iterdir())


def test_existing_output(pristine, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(pristine["old"], out, seed=1)  # an empty folder is as good as none
    first = snapshot(out)
    with pytest.raises(ValueError, match=r"`output` .*out exists; `overwrite`"):
        convert(pristine["old"], out, seed=2)
    assert snapshot(out) == first
    convert(pristine["old"], out, seed=2, overwrite=True, max_shard_size="100KB")
    assert "model.safetensors" not in snapshot(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_eat_what_is_not_a_checkpoint(pristine, tmp_path, monkeypatch):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"diary is not a checkpoint folder"):
        convert(pristine["old"], tmp_path / "diary", overwrite=True)
    source = Path(shutil.copytree(pristine["old"], tmp_path / "models" / "source"))
    (tmp_path / "models" / "config.json").write_text("{}")
    for output in (source, tmp_path / "models"):
        with pytest.raises(ValueError, match="holds the source"):
            convert(source, output, overwrite=True)
    linked = Path(shutil.copytree(pristine["old"], tmp_path / "linked"))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds the source's model\.safetensors, a link"):
        convert(linked, source, overwrite=True)
    shutil.copytree(pristine["old"], tmp_path / "checkout")
    monkeypatch.setattr(convert_weights, "CODE_FOLDER", tmp_path / "checkout" / "code")
    with pytest.raises(ValueError, match="holds the code of VideoNSA"):
        convert(source, tmp_path / "checkout", overwrite=True)
    assert snapshot(tmp_path / "diary") == {"monday.txt": b"dear diary"}
    assert snapshot(source) == snapshot(pristine["old"])


def test_two_processes_do_not_share_an_output(pristine, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    # A process of its own: lmms-eval, where a test of this process has run it, lets a process take a lock twice.
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".out.partial" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="being written by another"):
            convert(pristine["old"], tmp_path / "out")
        holder.communicate(b"\n")
    convert(pristine["old"], tmp_path / "out")
