"""A local copy of a store that lies at a URL: every file checked, the manifest last.

Until the manifest is there OUT is not a store. A file that is there with the right checksum is not fetched again, so an
interrupted pull goes on, and a store to which units were added since is brought up to date.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core import atomic_io, fsspec_files
from ldm_vae.core.errors import UsageError
from ldm_vae.core.file_record import checksum
from ldm_vae.core.ownership import Ownership, is_mark, own
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.format.layout import (
    EXTENSIONS,
    MANIFEST,
    QUARANTINE,
    SHARDS,
    shard_path,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    ShardRecord,
    read_finished,
    read_manifest,
    write_manifest,
)
from ldm_vae.latent_store.remote.store import file_url

CONNECTIONS = 8

File = tuple[ShardRecord, str]


@dataclass(frozen=True)
class PullPlan:
    """Plan of a pull: the files of the store at `url` that the folder `out` still needs, as (shard, extension)."""

    url: str
    out: Path
    manifest: Manifest
    missing: tuple[File, ...]

    @property
    def bytes(self) -> int:
        """Size of the missing files together."""
        return sum(shard.files[extension].bytes for shard, extension in self.missing)

    def __str__(self) -> str:
        there = len(self.manifest.shards) * len(EXTENSIONS) - len(self.missing)
        return f"{len(self.missing):,} files to fetch, {self.bytes / 1e6:,.1f} MB; {there:,} are there already"


def plan_pull(url: str, out: Path) -> PullPlan:
    """Compare a store with what is in `out`; nothing is changed.

    Raises:
        UsageError: no store there, it is not finished, or `out` holds another one, whose files would be overwritten.
        WorkError: the URL cannot be read.
    """
    manifest = read_finished(url)
    _check_place(url, out, manifest)
    every = [(shard, extension) for shard in manifest.shards for extension in EXTENSIONS]
    bar = Progress(every, desc="compare", unit="files", leave=False)
    missing = tuple(file for file in bar if checksum(_path(out, file)) != file[0].files[file[1]])
    return PullPlan(url, out, manifest, missing)


def _check_place(url: str, out: Path, manifest: Manifest) -> None:
    """Raises UsageError when a pull of this store would overwrite something else."""
    if (out / MANIFEST).exists():
        before = {shard.name: shard.files for shard in read_manifest(out).shards}
        if any(before.get(shard.name, shard.files) != shard.files for shard in manifest.shards):
            raise UsageError(f"OUT {out}: holds another store than {url}; choose another OUT")
    elif out.exists() and (
        not out.is_dir() or any(path.name != SHARDS and not is_mark(path) for path in out.iterdir())
    ):
        raise UsageError(f"OUT {out}: expected a new folder, or one that a pull of {url} has begun or finished")


def pull(plan: PullPlan) -> Manifest:
    """Fetch what is missing, then publish the manifest.

    Raises:
        UsageError: `out` has become another store since, or another launch is at work on it.
        WorkError: a file cannot be read, is not what the manifest says, or cannot be written; what came is kept.
    """
    with own(plan.out, "OUT") as owner:
        _check_place(plan.url, plan.out, plan.manifest)
        return _pull(plan, owner)


def _pull(plan: PullPlan, owner: Ownership) -> Manifest:
    try:
        (plan.out / SHARDS).mkdir(parents=True, exist_ok=True)
        for left in filter(atomic_io.is_temporary, (plan.out / SHARDS).iterdir()):  # by a pull that was killed
            left.unlink(missing_ok=True)
    except OSError as error:
        raise atomic_io.explained(error, plan.out) from error

    def fetch(file: File) -> int:
        shard, extension = file
        record = shard.files[extension]
        fsspec_files.download(file_url(plan.url, shard, extension), _path(plan.out, file), record)
        return record.bytes

    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        with Progress(total=plan.bytes, desc="pull", unit="B", unit_scale=True) as bar:
            for size in pool.map(fetch, plan.missing):
                bar.update(size)
    finally:
        pool.shutdown(cancel_futures=True)
    # downloads may take hours: OUT must still be this job's before it becomes a store
    owner.check()
    # before the manifest, with which OUT is complete
    if plan.manifest.quarantined:
        content = fsspec_files.read(f"{plan.url}/{QUARANTINE}")
        atomic_io.replace(plan.out / QUARANTINE, atomic_io.data(content))
    write_manifest(plan.out, plan.manifest)
    return plan.manifest


def _path(out: Path, file: File) -> Path:
    shard, extension = file
    return shard_path(out, shard.name, extension)
