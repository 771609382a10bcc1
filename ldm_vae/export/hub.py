"""Upload a finished folder to a model hub. huggingface_hub finds the token by itself: never read or logged here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.validation import first_line


def check_name(repo: str, argument: str = "--push_to_hub") -> None:
    """Raises UsageError unless `repo` can be a repository's name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{argument} {repo}: expected owner/name: {first_line(error)}") from error


def client() -> HfApi:
    """The hub that HF_ENDPOINT names, or the public one."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="ldm-vae")


@contextlib.contextmanager
def in_a_sentence(what: str, kept: str) -> Iterator[None]:
    """Say what went wrong with the hub, and what there still is. Raises WorkError."""
    try:
        yield
    except (UsageError, WorkError):
        raise
    except OfflineModeIsEnabled as error:
        raise WorkError(f"{what}: HF_HUB_OFFLINE is set; {kept}") from error
    except Exception as error:  # the network's errors are requests', httpx' or its own, by version
        cause = f": {first_line(error.__cause__)}" if error.__cause__ else ""  # hubs wrap what a thread ran into
        raise WorkError(f"{what}: {first_line(error)}{cause}; {kept}") from error


def push(folder: Path, repo: str, *, private: bool = False, path: str = "") -> str:
    """Upload everything in `folder` to the model `repo` (made if it does not exist), below `path` there; returns its
    address.

    Raises:
        WorkError: the hub cannot be reached or refuses.
    """
    api = client()
    with in_a_sentence(f"--push_to_hub {repo}", f"{folder} is written"):
        address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            repo_type="model",
            folder_path=folder,
            path_in_repo=path or None,
            commit_message="Upload with ldm-vae",
        )
    return str(address)
