"""The hub: which names are ids of it, and whether it answers."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import expanded, nearest_path, offline
from ldm_vae.core.validation import first_line

SECONDS = 5  # to connect, and to answer: what a hub that is there does in less than one

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILES = frozenset(  # endings of files that are meant by a path; a version (`sd-v1.5`) is none of them
    [
        ".arrow",
        ".bin",
        ".ckpt",
        ".gif",
        ".jpeg",
        ".jpg",
        ".json",
        ".lst",
        ".npy",
        ".onnx",
        ".parquet",
        ".png",
        ".pt",
        ".pth",
        ".safetensors",
        ".tar",
        ".tif",
        ".tiff",
        ".txt",
        ".webp",
        ".yaml",
        ".yml",
        ".zip",
    ]
)


def is_id(name: str) -> bool:
    """True of `owner/name` where neither that nor a folder `owner` is here: a missing file of it would be meant."""
    return bool(_ID.fullmatch(name)) and Path(name).suffix.lower() not in _FILES and not expanded(name).parent.is_dir()


def check_id(name: str, place: str) -> None:
    """Raises UsageError for a name that is rather a path at which nothing lies; `place` opens the sentence."""
    if is_id(name):
        return
    owner = Path(name).parent
    taken = _ID.fullmatch(name) and owner.is_dir()
    reason = f"no hub id, since `{owner}` is a folder here" if taken else "not a hub id (owner/name)"
    raise UsageError(f"{place}: no such folder or file, and {reason}{nearest_path(name)}")


def silence() -> str | None:
    """Why the hub gives no answer within SECONDS; None where it gives any."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
    except Exception as error:  # of the client's HTTP library, which differs by version
        return f"{constants.ENDPOINT} does not answer ({first_line(error)})"
    return f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else None


@functools.cache  # asked once a process
def connect() -> str | None:
    """Before the first call of the hub: why nothing can be fetched, or None.

    The hub's clients, those in transformers and datasets too, then go by their caches from here on; where it does not
    answer they would try for a minute a file.
    """
    from huggingface_hub import constants

    reason = "LDM_VAE_OFFLINE or HF_HUB_OFFLINE is set" if offline() else silence()
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # datasets and the processes that read data take it from there
        constants.HF_HUB_OFFLINE = True
    return reason


def failure(error: Exception, name: str, reason: str | None) -> str:
    """Reason of a failed call of the hub: `reason` of `connect`, else the client's own words."""
    said = first_line(error) if reason is None else f"{reason}, and it is not in the cache"
    return f"{said}{nearest_path(name)}"
