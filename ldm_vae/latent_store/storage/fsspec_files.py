"""Files of a store that lies at a URL: any file system that fsspec knows (s3, gs, hf, http, memory, ...).

A file is fetched whole, under a temporary name, compared with the manifest's size and checksum, and only then given its
name: an interrupted or damaged download is never a shard. What may pass (a lost connection, a server's 500, a body that
ends early) is tried again after a growing, jittered wait; what stays wrong ends in one sentence.

Credentials and options are those that fsspec finds: the cloud's own environment variables, or fsspec's configuration
(FSSPEC_S3='{"anon": true}').
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from huggingface_hub.errors import OfflineModeIsEnabled

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store.storage.file_record import FileRecord, checksum

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds; each wait is twice the one before
CONNECT_TIMEOUT, READ_TIMEOUT = 30.0, 60.0  # seconds without a byte; aiohttp's default ends any file after five minutes

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of the local disk: `publish` says what it is
_PASSING = {408, 425, 429}  # of HTTP's 4xx: timeout, too early, too many requests
_jitter = random.SystemRandom()  # never the global generator


class AbsentError(WorkError):
    """There is no such file."""


class _MismatchError(Exception):
    """The downloaded file is not the one in the manifest."""


def read(url: str) -> bytes:
    """The content of a small file, as it is there now.

    Raises:
        UsageError: no such file system, or its package is not installed.
        AbsentError: no such file.
        WorkError: it cannot be read.
    """

    def work() -> bytes:
        files, path = _open(url)
        files.invalidate_cache()  # listings of an earlier look
        content: bytes = files.cat_file(path)
        return content

    return _patiently(url, work, ATTEMPTS)


def download(url: str, path: Path, record: FileRecord, *, attempts: int = ATTEMPTS) -> None:
    """Fetch a file to `path`, complete and with the checksum of `record`.

    Raises:
        AbsentError: no such file.
        WorkError: it cannot be read, is not what the manifest says, or `path` cannot be written.
    """
    came: list[FileRecord] = []

    def fetch(temporary: Path) -> None:
        _patiently(url, lambda: attempt(temporary), attempts)

    def attempt(temporary: Path) -> None:
        files, remote = _open(url)
        try:
            files.get_file(remote, str(temporary))
        except Exception as error:
            listed = bool(
                files.dircache
            )  # by an earlier look, perhaps before a change: the next one is at what is there
            files.invalidate_cache()
            if not (listed and isinstance(error, FileNotFoundError)):
                raise
            files.get_file(remote, str(temporary))
        found = checksum(temporary)
        if found == record:
            return
        if found.bytes != record.bytes:
            what = f"has {found.bytes:,} bytes, the manifest says {record.bytes:,}"
        else:
            what = "its checksum is not the manifest's"
        # damage on the way differs from time to time, damage at the source does not
        if found in came:  # the same wrong bytes once more: it is no accident of the way
            raise WorkError(f"{url}: {what}: it is damaged, or the store there has been replaced; open it again")
        came.append(found)
        raise _MismatchError(what)

    atomic_io.replace_by(path, fetch)


def _open(url: str) -> tuple[Any, str]:
    """The file system and the path on it; per process and thread, by fsspec's own cache."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies as the environment has them
        elif scheme == "hf" and os.environ.get("HF_ENDPOINT"):  # else a file system of another endpoint is given again
            options = {"endpoint": os.environ["HF_ENDPOINT"]}
        files, path = url_to_fs(url, **options)
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        needed = str(error) if package in ("", "fsspec") else f"reading it needs `pip install {package}`"
        raise UsageError(f"{url}: {needed}") from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise UsageError(f"{url}: {error}; fsspec knows {known}") from error
    return files, path


def _patiently(url: str, work: Callable[[], T], attempts: int) -> T:
    for attempt in itertools.count(1):
        try:
            return work()
        except (UsageError, WorkError):
            raise
        except FileNotFoundError as error:
            raise AbsentError(f"{url}: no such file there") from error
        except Exception as error:  # each file system has errors of its own
            if isinstance(error, OSError) and error.errno in _DISK:
                raise  # to `publish`, which says it in a sentence
            if attempt == attempts or _is_final(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                raise WorkError(f"{url}: cannot be read{tries}: {_sentence(error)}") from error
        time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * _jitter.uniform(0.5, 1.0))
    raise AssertionError("counts without end")


def _is_final(error: Exception) -> bool:
    """True for an error that another attempt cannot help: refused, forbidden, or not possible at all."""
    # aiohttp's errors have `status`, those of requests a response with one
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING
    return isinstance(error, PermissionError | OfflineModeIsEnabled | NotImplementedError | ValueError | TypeError)


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
