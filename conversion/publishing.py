"""`convert_weights.py --push-to-hub`: private unless asked otherwise, and only when all of it is there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # httpx's base class, of whichever version the client uses

from hub_videonsa import push_folder

from .plan import Plan
from .source import first_line
from .writing import result_files


def check_repo_id(name: str, value: str) -> None:
    """Refuse what cannot be the id of a Hub repository."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
        raise ValueError(f"`{name}` must be the id of a Hub repository such as 'org/name', got {value!r}")


def open_repository(repo_id: str, public: bool) -> None:
    """Create the repository, so that a missing permission shows before the work and not after it.

    Raises:
        ValueError: it exists and is public, and `public` is not asked for.
        OSError: the Hub refused or failed.
    """
    with _push_errors(repo_id, "nothing has been done"):
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
        is_public = not HfApi().model_info(repo_id).private
    if is_public and not public:
        raise ValueError(f"`push_to_hub` {repo_id!r} is a public repository; `public` (--public) pushes to it")


def push(folder: Path, repo_id: str, public: bool, plan: Plan) -> str:
    """Push a complete checkpoint, and nothing else that lies in its folder.

    Returns:
        The id of the commit that holds it.
    Raises:
        OSError: the Hub refused or failed.
    """
    with _push_errors(
        repo_id, f"the checkpoint in {folder} is complete, and the same command sends what has not arrived"
    ):
        commit = push_folder(
            folder,
            repo_id,
            config=plan.config.to_dict(),
            paths=result_files(plan),
            as_converted=True,
            private=True,
            commit_message="Upload a converted checkpoint",
        )
        if public and HfApi().model_info(repo_id).private:
            HfApi().update_repo_settings(repo_id, private=False)
    return commit.oid


@contextmanager
def _push_errors(repo_id: str, state: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: what huggingface_hub makes of a failed upload
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OSError(f"the Hub did not take `push_to_hub` {repo_id!r}: {first_line(cause)}; {state}") from error
