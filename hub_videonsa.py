"""Saved models that load by themselves: the folder of kernels, the model card, and one commit that brings all of it to
the Hub.

Used by `save_pretrained` and `push_to_hub` of the model and of the processor, and by `convert_weights.py`. Weights are
uploaded before the commit that shows them, so that an interrupted push leaves the repository as it was; the next one
sends only what has not arrived, and nothing where nothing has changed.
"""

import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session

# A card with this line is ours to write anew; a card without it is the user's.
CARD_MARK = "<!-- Written by VideoNSA; a later push writes it anew. Delete this line to keep a card of your own. -->"
CARD_NAME = "README.md"

# huggingface_hub waits for an answer to an upload for ever; a large file may take the Hub minutes to accept.
UPLOAD_TIMEOUT_SECONDS = 300.0

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_INTRODUCTION = {
    "videonsa": """\
Qwen2.5-VL that reads long videos: in every decoder layer, video and image tokens go through Native Sparse Attention
(compressed blocks, selected blocks and a sliding window, mixed by learnt gates), while text tokens keep dense
attention. The method is that of
[VideoNSA: Native Sparse Attention Scales Video Understanding](https://arxiv.org/abs/2510.02295); the code comes with
the weights.""",
    "qwen2_5_vl": """\
A plain Qwen2.5-VL, with dense attention and without gates: the Dense-NSA ablation of
[VideoNSA: Native Sparse Attention Scales Video Understanding](https://arxiv.org/abs/2510.02295) where the weights are
VideoNSA's. It is loaded by transformers alone.""",
}
_USAGE = """\
```python
from transformers import {auto_class}, AutoProcessor

repo = "{repo_id}"
model = {auto_class}.from_pretrained(repo, {trust}dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(repo{trust_processor}){reader}
content = [{{"type": "video", "video": "my.mp4"}}, {{"type": "text", "text": "What happens at the end?"}}]
options = {{"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}}
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], fps=2, **options).to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```
"""
_SETTINGS = {
    "nsa_variant": '`"paper"`: the attention of the paper; `"released"`: of the code published with its weights',
    "nsa_mode": '`"sparse"`, or `"dense"` for Qwen2.5-VL\'s attention',
    "block_size": "vision tokens per key block",
    "block_counts": "blocks that each token selects, its own included",
    "window_size": "tokens of the sliding window, the token itself included",
    "gate_temperature": "divides the gate logits",
}
_SOURCES = {
    "qwen2_5_vl": "a Qwen2.5-VL checkpoint",
    "published": "the published VideoNSA weights",
    "videonsa": "a VideoNSA checkpoint",
}
_CITATION = """\
```bibtex
@article{song2025videonsa,
  title   = {VideoNSA: Native Sparse Attention Scales Video Understanding},
  author  = {Song, Enxin and others},
  journal = {arXiv preprint arXiv:2510.02295},
  year    = {2025}
}
```
"""


def model_card(
    config: dict[str, Any],
    repo_id: str,
    *,
    as_converted: bool = False,
    base_model: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The model card of a repository.

    Args:
        config: the model's configuration; what `convert_weights.py` did is read from its `conversion`, the settings of
            the attention from its `text_config`. Empty if it is not known: the card then has no such sections.
        repo_id: of the repository, for the lines that load it.
        as_converted: the weights are those that `convert_weights.py` wrote; they may have been trained since otherwise.
        base_model: Hub id of what the weights were made of; None means what `conversion` says.
        tags: more tags for the metadata.
    """
    conversion = config.get("conversion") or {}
    is_plain = config.get("model_type") == "qwen2_5_vl"
    own_tags = ["video", "long-video", "sparse-attention", "native-sparse-attention", "custom_code"]
    data = ModelCardData(
        base_model=base_model or conversion.get("base_model"),
        library_name="transformers",
        license=conversion.get("license"),
        license_name=conversion.get("license_name"),
        license_link=conversion.get("license_link"),
        pipeline_tag="image-text-to-text" if is_plain else "video-text-to-text",
        tags=["qwen2_5_vl", *([] if is_plain else own_tags), *tags],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n{CARD_MARK}\n\n# {repo_id.split('/')[-1]}",
        _INTRODUCTION["qwen2_5_vl" if is_plain else "videonsa"],
        "## Use",
        _USAGE.format(
            repo_id=repo_id,
            auto_class="AutoModelForImageTextToText" if is_plain else "AutoModel",
            trust="" if is_plain else "trust_remote_code=True, ",
            trust_processor="" if is_plain else ", trust_remote_code=True",
            reader="  # reads video files with torchcodec" if is_plain else "",
        ).strip(),
    ]
    settings = {name: value for name, value in (config.get("text_config") or {}).items() if name in _SETTINGS}
    if settings and not is_plain:
        rows = [
            f"| `{name}` | `{json.dumps(settings[name])}` | {_SETTINGS[name]} |"
            for name in _SETTINGS
            if name in settings
        ]
        parts += ["## Settings of the attention", "\n".join(["| field | value | meaning |", "|---|---|---|", *rows])]
    if conversion:
        parts += ["## How it was made", _conversion_text(conversion, as_converted)]
    parts += ["## Licence", _license_text(conversion), "## Citation", _CITATION]
    return "\n\n".join(parts)


def _conversion_text(conversion: dict[str, Any], as_converted: bool) -> str:
    source = _SOURCES.get(conversion.get("source_kind"), "a checkpoint")
    if name := conversion.get("source"):
        source += f", [{name}](https://huggingface.co/{name})"
    if commit := conversion.get("source_commit"):
        source += f" at commit `{commit}`"
    converter = f"`convert_weights.py` of VideoNSA {conversion.get('converter_version', '')}".rstrip()
    if commit := conversion.get("converter_commit"):
        converter += f", commit `{commit}`"
    text = f"Converted by {converter}, from {source}."
    if not as_converted:
        text = f"The weights go back to a checkpoint that was converted by {converter}, from {source}."
    dtype = conversion.get("dtype")
    text += f" Every tensor was cast to {dtype}." if dtype else " Every tensor was copied bit by bit."
    if gate_init := conversion.get("gate_init"):
        text += (
            f" The gates are new and started from `--gate-init {gate_init} --seed {conversion.get('seed')}`: until "
            "they are trained, the answers to prompts with images or videos are not those of the source."
        )
    if conversion.get("gates_dropped"):
        text += " The gates of the source were left out."
    return text


def _license_text(conversion: dict[str, Any]) -> str:
    weights = "The weights keep the licence of the checkpoint they were made from"
    name = conversion.get("license_name") or conversion.get("license")
    link = conversion.get("license_link")
    if name:
        weights += f": [{name}]({link})" if link else f": {name}"
    return f"{weights}. The code of VideoNSA is under the Apache-2.0 licence."


def is_written_by_hand(card: str) -> bool:
    """Whether a model card is the user's, and so not to be replaced."""
    return CARD_MARK not in card


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    config: dict[str, Any] | None,
    paths: Iterable[str] | None = None,
    as_converted: bool = False,
    loaded_from: str | None = None,
    tags: Iterable[str] = (),
    private: bool | None = True,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Make the files of a folder the content of a Hub repository, in one commit, with a model card.

    Weights that the repository holds and the folder, which has others, does not are deleted in the same commit. A card
    that the user has written stays: the repository's, or else the folder's.

    Args:
        folder: a saved model, processor, or both.
        repo_id: of the repository, created if need be.
        config: for `model_card`; None writes a card only where there is none.
        paths: files to push, relative to the folder; None means all.
        as_converted: for `model_card`.
        loaded_from: where the model was loaded from; another Hub repository is what the card calls the base model.
        tags: for `model_card`; also added to a card that the user has written.
        private: of a repository that is created; None means the default of its owner.
        token, revision, create_pr, commit_message, commit_description: as in `HfApi.create_commit`.
    Returns:
        The commit; the repository's last one if there was nothing to change.
    Raises:
        HfHubHTTPError, or an error of the HTTP client: the Hub refused or failed. Nothing is committed.
    """
    folder, tags, api = Path(folder), list(tags), HfApi(library_name="videonsa", token=token)
    if paths is None:
        paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    paths = [path for path in paths if path != CARD_NAME and not Path(path).parts[-1].startswith(".")]
    with _upload_timeout():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        remote = {entry.path for entry in tree if isinstance(entry, RepoFile)}
        operations: list = [CommitOperationAdd(path, folder / path) for path in paths]
        operations += [CommitOperationDelete(path) for path in sorted(_outdated(remote, set(paths)))]
        card = _kept_card(api, folder, repo_id, remote, revision, tags)
        if card is None and (config is not None or CARD_NAME not in remote):
            is_repository = loaded_from and _HUB_ID.fullmatch(loaded_from) and not Path(loaded_from).exists()
            base_model = loaded_from if is_repository and loaded_from != repo_id else None
            card = model_card(config or {}, repo_id, as_converted=as_converted, base_model=base_model, tags=tags)
        if card is not None:
            operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _outdated(remote: set[str], new: set[str]) -> set[str]:
    """Files of the repository that would be loaded instead of new ones, or beside them."""
    outdated: set[str] = set()
    if any(_WEIGHTS.fullmatch(path) for path in new):
        outdated |= {path for path in remote if _WEIGHTS.fullmatch(path)}
    if any(path.startswith("nsa_kernels/") for path in new):
        outdated |= {path for path in remote if path.startswith("nsa_kernels/")}
    return outdated - new


def _kept_card(
    api: HfApi, folder: Path, repo_id: str, remote: set[str], revision: str | None, tags: list[str]
) -> str | None:
    """The card that the user has written, in the repository or else in the folder; None if there is none."""
    if CARD_NAME in remote:
        card = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_bytes().decode()
        if is_written_by_hand(card):
            return _add_tags(card, tags)
    if (folder / CARD_NAME).is_file():
        card = (folder / CARD_NAME).read_bytes().decode()
        if is_written_by_hand(card):
            return _add_tags(card, tags)
    return None


def _add_tags(text: str, tags: list[str]) -> str:
    """A card with these tags in its metadata too; unchanged if it has them."""
    if not tags:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    present = card.data.tags or []
    missing = [tag for tag in tags if tag not in present]
    if not missing:
        return text
    card.data.tags = [*present, *missing]
    return str(card)


@contextmanager
def _upload_timeout() -> Iterator[None]:
    session = get_session()
    before = session.timeout
    session.timeout = UPLOAD_TIMEOUT_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def save_kernel_folder(directory: str | os.PathLike, names: Iterable[str]) -> None:
    """Write `nsa_kernels/` into a saved model, and remove the flat copies that transformers makes of its files.

    Args:
        directory: of the saved model.
        names: the kernels' modules.
    """
    source, target = Path(__file__).parent / "nsa_kernels", Path(directory) / "nsa_kernels"
    if target.exists() and source.samefile(target):
        return
    contents = {f"{name}.py": (source / f"{name}.py").read_bytes() for name in names}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for name, content in contents.items():
        (target / name).write_bytes(content)
        flat = Path(directory) / name
        if flat.is_file() and flat.read_bytes() == content:
            flat.unlink()


class PushMixin:
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` through `push_folder`; goes before transformers' class."""

    _pushed_kind = "model"  # names it in commit messages

    def _card_arguments(self, repo_id: str) -> dict[str, Any]:
        """`config`, `loaded_from` and `tags` for `push_folder`."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs) -> CommitInfo:
        """Make a repository on the Hub that loads by itself.

        A model card is written unless the repository has one that the user wrote, which is one without the line
        `hub_videonsa.CARD_MARK`. An interrupted push leaves the repository as it was and can be repeated; a push that
        changes nothing makes no commit.

        Args:
            repo_id: "org/name", created if need be, private unless `private=False`.
            max_shard_size: as in `save_pretrained`.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`, as in
                `push_folder`, and `tags` for the model card.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self._push(folder, repo_id, **kwargs)

    def _push(self, folder: str, repo_id: str, tags: str | list[str] | None = None, **kwargs) -> CommitInfo:
        card = self._card_arguments(repo_id)
        card["tags"] = [*card.get("tags", ()), *([tags] if isinstance(tags, str) else tags or [])]
        kwargs["commit_message"] = kwargs.get("commit_message") or f"Upload {self._pushed_kind}"
        return push_folder(folder, repo_id, **card, **kwargs)

    @contextmanager
    def _pushing_what_changes(self, folder: str | os.PathLike, kwargs: dict[str, Any]) -> Iterator[None]:
        """Push what the block changes in `folder`, with those of `kwargs`, taken out, that are for `_push`."""
        names = (*inspect.signature(push_folder).parameters, "tags")
        kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(folder).name)
        before = _stamps(folder)
        yield
        changed = [path for path, stamp in _stamps(folder).items() if before.get(path) != stamp]
        self._push(os.fspath(folder), repo_id, paths=changed, **kwargs)


def _stamps(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Time of change and size of every file below a folder."""
    stats = {path: path.stat() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {path.relative_to(folder).as_posix(): (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}
