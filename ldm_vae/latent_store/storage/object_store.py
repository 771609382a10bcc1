"""Objects of a store at a URL of an object store (s3, gs, abfs, ...), through fsspec.

One request publishes a whole object, so no rename is needed and a reader never sees half of one. An object is staged in
a temporary file ($TMPDIR), sent, and looked at afterwards: an upload that was acknowledged and lost is sent again. What
was sent twice is the same object.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm_vae.core import atomic_io, fsspec_files
from ldm_vae.core.errors import UsageError
from ldm_vae.core.file_record import FileRecord
from ldm_vae.core.fsspec_files import AbsentError, open_files, patiently, status_of
from ldm_vae.latent_store.storage.objects import HashedFile, Write

# fsspec's names of stores whose one request makes a whole object; of others a reader could see half of one
WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "obs", "tos", "memory")
KEPT = "; what was finished is kept, the same command goes on from there"


class _LostError(Exception):
    """Raised for an object that was acknowledged and is not there as it was sent."""


@dataclass(frozen=True)
class ObjectStore:
    """Storage below a URL."""

    url: str
    connections: int = 16

    @property
    def scratch(self) -> Path | None:
        return None

    def prepare(self, *folders: str) -> None:
        """Raises UsageError where no whole object can be published. Folders there are none."""
        scheme = urlsplit(self.url).scheme
        if scheme not in WHOLE:
            raise UsageError(
                f"{self.url}: expected a place where one request publishes a whole object ({', '.join(WHOLE)}), got "
                f"{scheme}; write the store to a folder and copy it there, its manifest.json last"
            )

    def publish(self, name: str, write: Write) -> FileRecord:
        try:
            with tempfile.NamedTemporaryFile(prefix="ldm-vae-", suffix=atomic_io.TEMPORARY_SUFFIX) as file:
                hashed = HashedFile(file)  # type: ignore[arg-type]
                write(hashed)
                file.flush()
                self._send(name, hashed.record.bytes, lambda files, remote: files.put_file(file.name, remote))
                return hashed.record
        except OSError as error:
            raise atomic_io.explained(error, Path(tempfile.gettempdir())) from error

    def replace(self, name: str, content: bytes) -> None:
        self._send(name, len(content), lambda files, remote: files.pipe_file(remote, content))

    def create(self, name: str, content: bytes) -> None:
        def send(files: Any, remote: str) -> None:
            # a store without conditional writes: of two that begin in one moment the last is first
            if "mode" not in inspect.signature(getattr(files, "_pipe_file", files.pipe_file)).parameters:
                if not files.exists(remote):
                    files.pipe_file(remote, content)
                return
            try:
                files.pipe_file(remote, content, mode="create")
            except FileExistsError:
                pass
            except Exception as error:
                if status_of(error) != 412:  # s3fs knows the answer of AWS by its words alone
                    raise

        self._send(name, None, send)

    def read(self, name: str) -> bytes:
        try:
            return fsspec_files.read(f"{self.url}/{name}")
        except AbsentError as error:
            raise FileNotFoundError(str(error)) from error

    def read_range(self, name: str, first: int, stop: int) -> bytes:
        return fsspec_files.read_range(f"{self.url}/{name}", first, stop)

    def remove(self, name: str) -> None:
        def work() -> None:
            files, remote = open_files(f"{self.url}/{name}")
            files.rm_file(remote)

        with contextlib.suppress(AbsentError):
            patiently(f"{self.url}/{name}", work, verb="removed", more=KEPT)

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._listed(folder))

    def sizes(self, folder: str = "") -> Callable[[str], int]:
        listed = self._listed(folder)  # one request for a thousand objects
        return lambda name: listed.get(name, -1)

    def modified(self, name: str) -> float | None:
        def work() -> float:
            files, remote = open_files(f"{self.url}/{name}")
            files.invalidate_cache()
            when: datetime = files.modified(remote)
            return when.timestamp()

        try:
            return patiently(f"{self.url}/{name}", work)
        except AbsentError:
            return None

    def tidy(self, *folders: str) -> None:
        """Nothing is left of an upload that was stopped but parts, which the bucket's own rule takes away."""

    def _listed(self, folder: str) -> dict[str, int]:
        found = fsspec_files.listed(f"{self.url}/{folder}")
        return {f"{folder}/{name}" if folder else name: int(said["size"] or 0) for name, said in found.items()}

    def _send(self, name: str, size: int | None, send: Callable[[Any, str], None]) -> None:
        """Send an object of `size` bytes (None: it may be another's), and see that it is there."""

        def work() -> None:
            files, remote = open_files(f"{self.url}/{name}")
            send(files, remote)
            files.invalidate_cache()
            try:
                found = int(files.info(remote)["size"])
            except FileNotFoundError as error:
                raise _LostError("its upload was acknowledged, and it is not there") from error
            if size is not None and found != size:
                raise _LostError(f"its upload was acknowledged, and it has {found:,} bytes of {size:,}")

        try:
            patiently(f"{self.url}/{name}", work, verb="written", more=KEPT)
        except AbsentError as error:
            bucket = urlsplit(self.url).netloc
            raise UsageError(f"{self.url}: there is no bucket {bucket}; make it first, or name another") from error
