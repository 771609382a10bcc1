"""Storage of objects: whole or not there, and any storage gets the bytes that a folder gets."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from sentences import refused

from ldm_vae.core.atomic_io import temporary_name
from ldm_vae.core.errors import WorkError
from ldm_vae.core.file_record import FileRecord
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.publication import publish_shard
from ldm_vae.latent_store.format.shards import Spool, TensorSpec
from ldm_vae.latent_store.storage.objects import HashedFile, LocalFolder, Write

IDENTITY = Identity(
    encoder="e" * 64, preprocessing="p", resolution=(32,), store="moments", dtype="fp16", mixed_precision="no",
    shard_size=8,
)  # fmt: skip


def record_of(content: bytes) -> FileRecord:
    return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class Memory:
    """Another storage: objects of a dict, as those of a bucket."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def publish(self, name: str, write: Write) -> FileRecord:
        file = io.BytesIO()
        hashed = HashedFile(file)
        write(hashed)
        self.objects[name] = file.getvalue()
        return hashed.record

    def replace(self, name: str, content: bytes) -> None:
        self.objects[name] = content

    def read(self, name: str) -> bytes:
        return self.objects[name]

    def names(self, folder: str) -> list[str]:
        return sorted(name for name in self.objects if name.startswith(f"{folder}/"))


def test_an_object_is_published_once_and_another_one_of_its_name_is_replaced(tmp_path: Path) -> None:
    storage = LocalFolder(tmp_path)
    (tmp_path / "shards").mkdir()
    assert storage.publish("shards/a", lambda file: file.write(b"one")) == record_of(b"one")
    before = (tmp_path / "shards" / "a").stat().st_ino
    assert storage.publish("shards/a", lambda file: file.write(b"one")) == record_of(b"one")
    assert (tmp_path / "shards" / "a").stat().st_ino == before
    assert storage.publish("shards/a", lambda file: file.write(b"two")) == record_of(b"two")
    assert storage.read("shards/a") == b"two"
    storage.replace("manifest.json", b"{}")
    assert storage.read("manifest.json") == b"{}"
    with pytest.raises(FileNotFoundError):
        storage.read("shards/b")


def test_what_fails_leaves_the_older_object_and_what_is_unfinished_is_not_listed(tmp_path: Path) -> None:
    storage = LocalFolder(tmp_path)
    (tmp_path / "shards").mkdir()
    storage.publish("shards/b", lambda file: file.write(b"old"))
    storage.publish("shards/a", lambda file: file.write(b"a"))

    def full(file: HashedFile) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with refused(WorkError, str(tmp_path / "shards" / "b")):
        storage.publish("shards/b", full)
    temporary_name(tmp_path / "shards" / "c").write_bytes(b"left by a killed writer")
    assert storage.names("shards") == ["shards/a", "shards/b"] and storage.read("shards/b") == b"old"


def test_any_storage_gets_the_bytes_of_a_shard_that_a_folder_gets(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    spool = Spool(tmp_path, [TensorSpec(name, "F16", (4, 2, 2)) for name in ("mean", "logvar")])
    draw = np.random.default_rng(0)
    spool.append({name: draw.normal(size=(3, 4, 2, 2)).astype(np.float16) for name in ("mean", "logvar")})
    samples = [{"key": f"{number}.png", "caption": "x"} for number in range(3)]
    local, memory = LocalFolder(tmp_path), Memory()
    shards = [publish_shard(one, IDENTITY, 0, (32, 4, 4), spool, samples) for one in (local, memory)]
    spool.close()
    assert shards[0] == shards[1] and len(memory.objects) == 3
    assert {name: local.read(name) for name in local.names("shards")} == memory.objects
    record, types = shards[0]
    assert record.files == {name.rpartition(".")[2]: record_of(content) for name, content in memory.objects.items()}
    assert record.rows == 3 and types["key"] == "string"
