"""Upload a finished folder to a model hub. huggingface_hub finds the token by itself: never read or logged here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ldm_vae.errors import UsageError, WorkError


def check_name(repo: str) -> None:
    """Raises UsageError unless `repo` can be a repository's name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {repo}: expected owner/name: {_first_line(error)}") from error


def push(
    folder: Path, repo: str, *, private: bool = False, kind: Literal["model", "dataset"] = "model", path: str = ""
) -> str:
    """Upload everything in `folder` to `repo` (made if it does not exist), below `path` there; returns its address.

    Raises:
        WorkError: the hub cannot be reached or refuses.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="ldm-vae")
    try:
        address = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            repo_type=kind,
            folder_path=folder,
            path_in_repo=path or None,
            commit_message="Upload with ldm-vae",
        )
    except OfflineModeIsEnabled as error:
        raise WorkError(f"--push_to_hub {repo}: HF_HUB_OFFLINE is set; {folder} is written") from error
    except Exception as error:  # the network's errors are requests', httpx' or its own, by version
        raise WorkError(f"--push_to_hub {repo}: {_first_line(error)}; {folder} is written") from error
    return str(address)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
