"""Upload of a latent store to a dataset repository of a model hub, with its card.

Shards go first, in commits of a few hundred files, each compared with its checksum before it is sent; what the hub has
already is not sent again, so an interrupted push goes on. The manifest comes with the last commit: until then a reader
finds no store there, or the one that was there before. Where shards of that one have to be overwritten, its manifest
leaves with the first commit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.file_record import FileRecord, checksum
from ldm_vae.core.progress import Progress
from ldm_vae.export.hub import check_name, client, in_a_sentence
from ldm_vae.export.store_card import store_card
from ldm_vae.latent_store import LatentDataset
from ldm_vae.latent_store.format import shards
from ldm_vae.latent_store.format.layout import (
    EXTENSIONS,
    MANIFEST,
    QUARANTINE,
    SHARDS,
    TENSORS,
    shard_file,
    shard_path,
)
from ldm_vae.latent_store.format.manifest import Manifest, read_finished
from ldm_vae.latent_store.format.rows import map_shard
from ldm_vae.latent_store.maintain.provenance import find_vae
from ldm_vae.latent_store.read.pictures import contact_sheet

COMMIT_FILES = 300
CARD, PICTURE = "README.md", "samples.png"
MESSAGE = "Upload with ldm-vae"


@dataclass(frozen=True)
class PushPlan:
    """Plan of an upload: the files of a store that a repository still needs, by their path in both."""

    store: Path
    repo: str
    revision: str | None
    manifest: Manifest
    missing: dict[str, FileRecord]
    stale: tuple[str, ...]
    """Files of shards there that this store does not have."""
    overwrites: bool
    """True if the store that is there now has shards of the same names with other content."""

    def __str__(self) -> str:
        there = len(self.manifest.shards) * len(EXTENSIONS) - len(self.missing)
        size = sum(record.bytes for record in self.missing.values()) / 1e6
        gone = f"; {len(self.stale):,} files of an earlier store will be removed" if self.stale else ""
        return f"{len(self.missing):,} files to send, {size:,.1f} MB; {there:,} are there already{gone}"


def plan_push(store: Path, repo: str, revision: str | None = None) -> PushPlan:
    """Compare a store with what a dataset repository has; nothing is changed.

    Raises:
        UsageError: no store, one that is not finished, or no name of a repository.
        WorkError: a shard is not as the manifest says; the hub cannot be asked.
    """
    check_name(repo, "REPO_ID")
    manifest = read_finished(store)
    for shard in manifest.shards:
        map_shard(shard_path(store, shard.name, TENSORS), manifest.identity, shard)  # a look at its header
        shards.map_rows(shard_path(store, shard.name), shard.rows)
    there = _files_there(repo, revision)
    wanted = {
        shard_file(shard.name, extension): shard.files[extension]
        for shard in manifest.shards
        for extension in EXTENSIONS
    }
    missing = {path: record for path, record in wanted.items() if not _is_there(there.get(path), record, store / path)}
    stale = tuple(path for path in there if path.startswith(f"{SHARDS}/") and path not in wanted)
    overwrites = MANIFEST in there and any(path in there for path in missing)
    return PushPlan(store, repo, revision, manifest, missing, stale, overwrites)


def push(plan: PushPlan, *, private: bool = False, license: str | None = None, vae: str | None = None) -> str:
    """Send what is missing, then card, picture and manifest; returns the repository's address.

    Args:
        private: the repository, if it is made now.
        license: of the data, for the card.
        vae: decodes the picture; else the VAE where the manifest says it was, else there is no picture.

    Raises:
        UsageError: `vae` is not the store's.
        WorkError: a file is damaged, or the hub cannot be reached or refuses; what was sent is kept.
    """
    picture = _picture(plan, vae)
    api = client()
    with in_a_sentence(f"REPO_ID {plan.repo}", "what was sent is kept, the same command goes on from there"):
        address = api.create_repo(plan.repo, repo_type="dataset", private=private, exist_ok=True)

        def commit(operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> None:
            api.create_commit(
                address.repo_id, operations, commit_message=MESSAGE, repo_type="dataset", revision=plan.revision
            )

        if plan.revision is not None:
            api.create_branch(address.repo_id, branch=plan.revision, repo_type="dataset", exist_ok=True)
        # from the first overwritten shard on the old manifest would describe files that are not there
        if plan.overwrites:
            commit([CommitOperationDelete(MANIFEST)])
        with Progress(total=len(plan.missing), desc="push", unit="files") as bar:
            for paths in _parts(plan):
                # checked at the last moment before sending: damage on the disk must not be published
                commit([_checked(plan.store, path, plan.missing[path]) for path in paths])
                bar.update(len(paths))
        card = store_card(plan.repo, plan.manifest, license, on_hub=True, picture=PICTURE if picture else None)
        last = [CommitOperationAdd(CARD, card.encode()), CommitOperationAdd(MANIFEST, plan.manifest.to_bytes())]
        last += [CommitOperationAdd(PICTURE, picture)] if picture else []
        if plan.manifest.quarantined:
            last.append(CommitOperationAdd(QUARANTINE, plan.store / QUARANTINE))
        # one commit: the manifest appears, and files that it does not name leave, at the same moment
        commit([*last, *(CommitOperationDelete(path) for path in plan.stale)])
    return str(address)


def _files_there(repo: str, revision: str | None) -> dict[str, RepoFile]:
    with in_a_sentence(f"REPO_ID {repo}", "nothing was sent"):
        try:
            entries = list(client().list_repo_tree(repo, recursive=True, repo_type="dataset", revision=revision))
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            return {}
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_there(there: RepoFile | None, record: FileRecord, local: Path) -> bool:
    if there is None or there.size != record.bytes:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == record.sha256
    # git's own hash of a file: "blob SIZE\0" and the content
    content = local.read_bytes() if local.is_file() else b""  # a small file, which the hub keeps in git
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _parts(plan: PushPlan) -> Iterator[tuple[str, ...]]:
    paths = iter(plan.missing)
    while part := tuple(itertools.islice(paths, COMMIT_FILES)):
        yield part


def _checked(store: Path, path: str, record: FileRecord) -> CommitOperationAdd:
    if checksum(store / path) != record:
        raise WorkError(f"{store / path}: is not as the manifest says; run `ldm-vae store repair`")
    return CommitOperationAdd(path, store / path)


def _picture(plan: PushPlan, named: str | None) -> bytes | None:
    if plan.manifest.samples == 0:
        return None
    try:
        vae = find_vae(plan.store, plan.manifest, named)
    except UsageError:
        if named is not None:
            raise
        return None
    return contact_sheet(
        LatentDataset(plan.store, sample=False, columns=(), normalisation=plan.manifest.for_decoding), vae
    )
