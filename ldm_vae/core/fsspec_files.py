"""Files that lie at a URL: any file system that fsspec knows (s3, gs, hf, http, memory, ...).

A file of a store is fetched whole, under a temporary name, compared with the manifest's size and checksum, and only
then given its name: an interrupted or damaged download is never a shard. Never more bytes are taken than the manifest
says, or LARGEST of a file that it does not name. What may pass (a lost connection, a server's 500, a body that ends
early or stands still) is tried again after a growing, jittered wait; what stays wrong ends in one sentence.

Credentials and options are those that fsspec finds: the cloud's own environment variables, or fsspec's configuration
(FSSPEC_S3='{"anon": true}').
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from huggingface_hub.errors import OfflineModeIsEnabled

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.file_record import FileRecord, checksum
from ldm_vae.core.files import LARGEST, OversizeError, Transfer

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds; each wait is twice the one before
CONNECT_TIMEOUT, READ_TIMEOUT = 30.0, 60.0  # seconds without a byte; aiohttp's default ends any file after five minutes

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of the local disk: `publish` says what it is
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_PASSING = {408, 409, 425, 429}  # of HTTP's 4xx: timeout, two writes at once, too early, too many requests
clock = time.monotonic
_jitter = random.SystemRandom()  # never the global generator


class AbsentError(WorkError):
    """There is no such file."""


class _MismatchError(Exception):
    """The downloaded file is not the one in the manifest."""


def read(url: str) -> bytes:
    """The content of a file that no manifest describes, as it is there now.

    Raises:
        UsageError: no such file system, or its package is not installed.
        AbsentError: no such file.
        WorkError: it cannot be read, or has more than LARGEST bytes.
    """

    def work() -> bytes:
        files, remote = open_files(url)
        files.invalidate_cache()  # listings of an earlier look
        # by way of the disk: a file on its way has an end there, and costs no memory until it has come
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "content")
            _get(files, remote, path, LARGEST)
            return path.read_bytes()

    return patiently(url, work, ATTEMPTS)


def read_range(url: str, first: int, stop: int) -> bytes:
    """Bytes [first, stop) of a file, or as many of them as there are. Raises as `read`."""

    def work() -> bytes:
        files, remote = open_files(url)
        content: bytes = files.cat_file(remote, start=first, end=stop)
        if len(content) > stop - first:
            raise WorkError(
                f"{url}: expected {stop - first:,} bytes of it, got {len(content):,}: it gives no parts; download it"
            )
        return content

    return patiently(url, work)


class RangedFile(io.RawIOBase):
    """A file of a known size, read by `read_range`, for libraries that read and seek."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._place = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        data = read_range(self._url, self._place, stop) if stop > self._place else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def listed(url: str, below: bool = False) -> dict[str, dict[str, Any]]:
    """The files in a folder, or anywhere below it, by name from there; each with what the file system says of it
    (`size`, ...). Nothing where there is no such folder."""

    def work() -> dict[str, dict[str, Any]]:
        files, remote = open_files(url)
        files.invalidate_cache()  # listings of an earlier look
        root = remote.rstrip("/")
        found = [*files.find(root, detail=True).values()] if below else files.ls(root, detail=True)
        return {entry["name"].rstrip("/").removeprefix(f"{root}/"): entry for entry in found}

    try:
        return patiently(url.rstrip("/"), work)
    except AbsentError:  # an object store has no folders: this one is empty
        return {}


def told(url: str) -> dict[str, Any]:
    """The file system's record of a file (`size`, `ETag`, ...), as of now. Raises as `read`."""

    def work() -> dict[str, Any]:
        files, remote = open_files(url)
        files.invalidate_cache()
        found: dict[str, Any] = files.info(remote)
        return found

    return patiently(url, work)


def version_of(said: Mapping[str, Any]) -> str | None:
    """The version of a file's content, as its file system tells it: another one is another content; None where it tells
    none (or a weak one, `W/...`)."""
    named = (said.get(name) for name in ("ETag", "etag", "md5Hash", "content_md5", "checksum"))
    version = next((str(one) for one in named if one), "")
    return version if version and not version.startswith("W/") else None


def download(url: str, path: Path, record: FileRecord, *, attempts: int = ATTEMPTS) -> None:
    """Fetch a file to `path`, complete and with the checksum of `record`.

    Raises:
        AbsentError: no such file.
        WorkError: it cannot be read, is not what the manifest says, or `path` cannot be written.
    """
    came: list[FileRecord] = []

    def fetch(temporary: Path) -> None:
        patiently(url, lambda: attempt(temporary), attempts)

    def attempt(temporary: Path) -> None:
        files, remote = open_files(url)
        try:
            _get(files, remote, temporary, record.bytes)
        except Exception as error:
            listed = bool(
                files.dircache
            )  # by an earlier look, perhaps before a change: the next one is at what is there
            files.invalidate_cache()
            if not (listed and isinstance(error, FileNotFoundError)):
                raise
            _get(files, remote, temporary, record.bytes)
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


class _Watch(Callback):  # type: ignore[misc]
    """Watch of a file on its way, told by fsspec of each piece that was written."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self._transfer, self._last = Transfer(largest), clock()

    def relative_update(self, inc: int = 1) -> None:
        last, self._last = self._last, clock()
        self._transfer.add(inc, self._last - last)


def _get(files: Any, remote: str, path: Path, largest: int) -> None:
    """Fetch a file, of at most `largest` bytes. Raises whatever the file system does, OversizeError, StalledError."""
    # the hub's own way tells a callback nothing; by a stream it does
    options = {"block_size": 0} if "hf" in files.protocol else {}
    files.get_file(remote, str(path), callback=_Watch(largest), **options)


def open_files(url: str) -> tuple[Any, str]:
    """The file system and the path on it; per process and thread, by fsspec's own cache."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
            # proxies as the environment has them; bytes as they are stored
            client = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
            options = {"client_kwargs": client}
        elif scheme in ("s3", "s3a"):
            # one layer of attempts, `patiently`: botocore's own five and s3fs's five would make 150 of our six
            ours = {
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": READ_TIMEOUT,
                "retries": {"total_max_attempts": 1},
            }
            given = fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
            options = {"config_kwargs": ours | given}
        elif scheme == "hf" and os.environ.get("HF_ENDPOINT"):  # else a file system of another endpoint is given again
            options = {"endpoint": os.environ["HF_ENDPOINT"]}
        files, path = url_to_fs(url, **options)
        if "s3" in files.protocol:
            files.retries = 1
    except ImportError as error:
        package = known_implementations.get(scheme, {}).get("class", "").partition(".")[0]
        needed = str(error) if package in ("", "fsspec") else f"reading it needs `pip install {package}`"
        raise UsageError(f"{url}: {needed}") from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise UsageError(f"{url}: {error}; fsspec knows {known}") from error
    return files, path


def patiently(url: str, work: Callable[[], T], attempts: int = ATTEMPTS, verb: str = "read", more: str = "") -> T:
    """Do the work, again after a growing, jittered wait where what failed may pass.

    Args:
        verb, more: of the sentence: `cannot be {verb}`, and what would do.

    Raises:
        AbsentError: no such file.
        WorkError: what fails for good, or still does.
    """
    for attempt in itertools.count(1):
        try:
            return work()
        except (UsageError, WorkError):
            raise
        except Exception as error:  # each file system has errors of its own
            if isinstance(error, FileNotFoundError) or status_of(error) == 404:
                raise AbsentError(f"{url}: no such file there") from error
            if isinstance(error, OSError) and error.errno in _DISK:
                raise  # to `publish`, which says it in a sentence
            if attempt == attempts or _is_final(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                said = f"{url}: cannot be {verb}{tries}: {_sentence(error)}{_remedy(error) or more}"
                raise WorkError(said) from error
        time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * _jitter.uniform(0.5, 1.0))
    raise AssertionError("counts without end")


def _is_final(error: Exception) -> bool:
    """True for an error that another attempt cannot help: refused, forbidden, or not possible at all."""
    if type(error).__name__ in _NO_CREDENTIALS:
        return True
    if (status := status_of(error)) is not None:
        return 400 <= status < 500 and status not in _PASSING
    final = OversizeError | PermissionError | OfflineModeIsEnabled | NotImplementedError | ValueError | TypeError
    return isinstance(error, final)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, None where it tells none."""
    # aiohttp's errors have `status`, those of requests a response with one, s3fs's the error of botocore as their cause
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None and isinstance(getattr(error.__cause__, "response", None), dict):
        return status_of(error.__cause__)  # type: ignore[arg-type]
    return status if isinstance(status, int) else None


def _remedy(error: Exception) -> str:
    if type(error).__name__ in _NO_CREDENTIALS:
        return "; the cloud's own variables give them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return "; the credentials at hand must be allowed to do it (of a store that is written: get, put, list, delete)"
    return ""


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
