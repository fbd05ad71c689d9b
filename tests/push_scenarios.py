"""`push_to_hub` of the model and of the processor, and model cards. Run by test_push, see scenarios.py."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub.errors import HfHubHTTPError
from scenarios import scenario
from tiny_random import save_tiny_qwen2_5_vl
from transformers import AutoModel, AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from checkpoints import snapshot
from convert_weights import convert
from hub_videonsa import CARD_MARK

VIDEO = Path(__file__).resolve().parent.parent / "demo" / "scene.mp4"
UPLOAD, COMMIT = r"^/__lfs/", r"/commit/main$"

hub: FakeHub = None  # set where the scenarios run


@functools.cache
def checkpoint(root: Path) -> Path:
    source = save_tiny_qwen2_5_vl(root / "qwen")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return convert(source, root / "checkpoint", base_model="org/Qwen")


def load(source: Path | str, revision: str = "main", **kwargs):
    """Model and processor, a line each."""
    model = AutoModel.from_pretrained(source, trust_remote_code=True, revision=revision, **kwargs)
    return model, AutoProcessor.from_pretrained(source, trust_remote_code=True, revision=revision)


def commits(repo_id: str) -> int:
    return len(hub.repos[repo_id].commits) - 1  # less the empty one that a repository begins with


def card_of(repo_id: str) -> str:
    return hub.files(repo_id)["README.md"].decode()


@scenario
def model_and_processor_in_either_order(folder):
    """One commit each; again, none; the card is the model's whichever came first."""
    model, processor = load(checkpoint(folder.parent))
    for repo_id, parts in (("me/A", (processor, model)), ("me/B", (model, processor))):
        for _ in range(2):
            for part in parts:
                part.push_to_hub(repo_id)
            assert commits(repo_id) == 2, hub.repos[repo_id].commits
        assert '| `nsa_variant` | `"paper"` |' in card_of(repo_id)
        load(repo_id)
    assert card_of("me/A").replace("me/A", "me/B").replace("# A", "# B") == card_of("me/B")

    processor.push_to_hub("me/Processor")
    assert all(repo.private for name, repo in hub.repos.items() if name.startswith("me/"))
    model.push_to_hub("me/Open", private=False)
    assert not hub.repos["me/Open"].private
    assert CARD_MARK in card_of("me/Processor") and "Settings" not in card_of("me/Processor")
    AutoProcessor.from_pretrained("me/Processor", trust_remote_code=True)


@scenario
def a_card_says_what_is_known(folder):
    model, _ = load(checkpoint(folder.parent), block_counts=7)
    model.push_to_hub("me/V", tags=["mine"], private=True)
    card = card_of("me/V")
    metadata = card.split("---")[1]
    assert "base_model: org/Qwen\n" in metadata and "license: apache-2.0\n" in metadata and "- mine\n" in metadata
    assert "pipeline_tag: video-text-to-text" in metadata and "library_name: transformers" in metadata
    assert "| `block_counts` | `7` |" in card and "# V\n" in card
    assert re.search(
        r"go back to a checkpoint that was converted by `convert_weights.py` of VideoNSA \d+\.\d+\.\d+", card
    )
    assert "--gate-init half --seed 0" in card and "apache-2.0. The code" in card and "@article{song2025" in card
    assert hub.repos["me/V"].private


@scenario
def what_is_made_of_a_repository_names_it(folder):
    commit = hub.seed("org/VideoNSA", checkpoint(folder.parent))
    model, _ = load("org/VideoNSA", revision=commit)
    model.push_to_hub("me/Tuned")
    assert "base_model: org/VideoNSA\n" in card_of("me/Tuned")
    model.push_to_hub("org/VideoNSA")
    assert "base_model: org/Qwen\n" in card_of("org/VideoNSA")


def usage(card: str) -> str:
    return re.search(r"```python\n(.+?)```", card, re.DOTALL)[1]


@scenario
def the_usage_of_a_card_runs(folder):
    model, processor = load(checkpoint(folder.parent))
    model.push_to_hub("me/V")
    processor.push_to_hub("me/V")
    shutil.copy(VIDEO, folder / "my.mp4")
    printed = io.StringIO()
    here = Path.cwd()
    os.chdir(folder)
    with contextlib.redirect_stdout(printed):
        exec(usage(card_of("me/V")), {})
    os.chdir(here)
    assert printed.getvalue()

    convert(checkpoint(folder.parent), folder / "dense", target="qwen2_5_vl", push_to_hub="me/Dense")
    lines = usage(card_of("me/Dense")).partition("content =")[0]  # the rest needs transformers' own reader of videos
    assert "trust_remote_code" not in lines
    exec(lines, found := {})
    assert type(found["model"]) is Qwen2_5_VLForConditionalGeneration
    assert type(found["processor"]) is Qwen2_5_VLProcessor


@scenario
def a_card_that_the_user_wrote_stays(folder):
    model, processor = load(checkpoint(folder.parent))
    model.push_to_hub("me/V")
    mine = b"---\r\ntags:\r\n- mine\r\n---\r\n# My words\r\n"
    hub.repos["me/V"].commit({"README.md": (mine, False)}, "my card")
    model.push_to_hub("me/V")
    processor.push_to_hub("me/V", commit_message="Upload of mine")
    assert hub.files("me/V")["README.md"] == mine and commits("me/V") == 3
    model.push_to_hub("me/V", tags="more")
    assert card_of("me/V") == "---\r\ntags:\r\n- mine\r\n- more\r\n---\r\n# My words\r\n"


@scenario
def saving_with_push_sends_what_was_saved(folder):
    """Not what else lies there; and a card of the user's in the folder is neither changed nor replaced."""
    model, processor = load(checkpoint(folder.parent))
    saved = folder / "saved"
    saved.mkdir()
    (saved / "notes.txt").write_text("private")
    (saved / "README.md").write_text("# My words")
    for _ in range(2):
        model.save_pretrained(saved, push_to_hub=True, repo_id="me/V", commit_message="Mine", private=True)
        processor.save_pretrained(saved, push_to_hub=True, repo_id="me/V")
    assert commits("me/V") == 2 and hub.repos["me/V"].private
    assert (saved / "README.md").read_text() == "# My words"
    here = snapshot(saved)
    assert here.pop("notes.txt") and hub.files("me/V") == here
    load("me/V")


def without_origin(files: dict[str, bytes], ignored: set[str]) -> dict[str, bytes]:
    """Without files to ignore, and without what transformers notes of where a tokenizer was loaded from."""
    tokenizer = json.loads(files["tokenizer_config.json"])
    for name in ("is_local", "local_files_only"):
        tokenizer.pop(name, None)
    files = files | {"tokenizer_config.json": json.dumps(tokenizer).encode()}
    return {name: data for name, data in files.items() if name not in ignored}


@scenario
def save_push_load_save(folder):
    """The same bytes at both ends."""
    model, processor = load(checkpoint(folder.parent))
    model.save_pretrained(folder / "first", max_shard_size="200KB")
    processor.save_pretrained(folder / "first")
    convert(folder / "first", folder / "converted", push_to_hub="me/Converted")
    for part in (model, processor):
        part.push_to_hub("me/V", max_shard_size="200KB")
    assert {key: data for key, data in hub.files("me/V").items() if key != "README.md"} == snapshot(folder / "first")
    for repo_id in ("me/V", "me/Converted"):
        again = folder / repo_id
        model, processor = load(repo_id)
        model.save_pretrained(again, max_shard_size="200KB")
        processor.save_pretrained(again)
        ignored = {"config.json"} if repo_id == "me/Converted" else set()
        before, after = (without_origin(snapshot(place), ignored) for place in (folder / "first", again))
        assert before.keys() == after.keys()
        assert not [name for name in before if before[name] != after[name]]
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("first", "me/Converted")]
    assert [config.pop("conversion")["source_kind"] for config in configs] == ["qwen2_5_vl", "videonsa"]
    assert configs[0] == configs[1]


@scenario
def an_interrupted_push(folder):
    """Nothing is to be seen of it, and the next one sends what is missing."""
    model, _ = load(checkpoint(folder.parent))
    hub.fail("PUT", UPLOAD + "[0-7]", status=503)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        model.push_to_hub("me/V", max_shard_size="100KB")
    assert commits("me/V") == 0
    hub.faults.clear()
    hub.fail("POST", COMMIT, lose_answer=True, times=1)
    hub.requests.clear()
    arrived = set(hub.lfs)
    with pytest.raises(Exception, match="Server disconnected"):
        model.push_to_hub("me/V", max_shard_size="100KB")
    assert commits("me/V") == 1 and hub.count("PUT", UPLOAD) == len(hub.lfs) - len(arrived)
    model.push_to_hub("me/V", max_shard_size="100KB")
    assert commits("me/V") == 1
    AutoModel.from_pretrained("me/V", trust_remote_code=True)


@scenario
def other_shards_replace_those_of_the_repository(folder):
    model, _ = load(checkpoint(folder.parent))
    for size in ("100KB", "5GB", "300KB"):
        with torch.no_grad():
            model.lm_head.weight += 1
        model.push_to_hub("me/V", max_shard_size=size)
        found = AutoModel.from_pretrained("me/V", trust_remote_code=True)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight), size


@scenario
def a_branch(folder):
    model, processor = load(checkpoint(folder.parent))
    model.push_to_hub("me/V", revision="dev")
    processor.push_to_hub("me/V", revision="dev")
    assert hub.files("me/V") == {} and "config.json" in hub.files("me/V", "dev")
    load("me/V", revision="dev")
    with pytest.raises(ValueError, match="not together with `distributed_checkpoint`"):
        model.save_pretrained(folder / "saved", push_to_hub=True, distributed_checkpoint=True)
