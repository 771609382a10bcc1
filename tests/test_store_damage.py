"""Damage: full disks, no permission, truncated files, flipped bits: a clear error or repair, nothing lost or twice."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import tree
from diffusers import AutoencoderKL
from sentences import refused
from store_sources import AFTER, Album, Pictures, names
from stores import SETTINGS, contents
from tiny_classes import tiny
from videos import write_films

from ldm_vae import open_images
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import read_manifest, verify, write_store
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.maintain.repair import Repaired, repair
from ldm_vae.latent_store.maintain.spot_check import reencode


def flip_a_bit(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def never() -> Any:
    raise AssertionError("nothing needs to be encoded again")


@pytest.fixture
def store(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "s", **SETTINGS)
    return tmp_path / "s"


def mend(store: Path, vae: Any, source: Any) -> Repaired:
    return repair(store, vae=lambda: vae, source=lambda: source)


# --- while writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the kernel refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [900, 5000, 20_000])
def test_a_full_disk_is_one_sentence_and_what_was_done_stays(
    store: Path, tiny_vae: AutoencoderKL, tmp_path: Path, limit: int
) -> None:
    with small_disk(limit), refused(WorkError, str(tmp_path / "full")):
        write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "full", **SETTINGS)
    left = [path.name for path in (tmp_path / "full").rglob("*") if atomic_io.is_temporary(path)]
    assert left == []
    write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "full", **SETTINGS)
    assert tree(tmp_path / "full") == tree(store)


def test_no_space_in_the_middle_of_a_unit(
    store: Path, tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = iter(range(10**6))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(syncs) == 12:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with refused(WorkError, str(tmp_path / "full")):
        write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "full", **SETTINGS)
    assert len(list((tmp_path / "full" / "units").glob("*.json"))) >= 1
    write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "full", **SETTINGS)
    assert tree(tmp_path / "full") == tree(store)


def test_a_folder_that_may_not_be_written(tiny_vae: AutoencoderKL) -> None:
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as undo:
        os.chmod(place, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
            undo.callback(os.seteuid, 0)
        with pytest.raises(WorkError, match=f"OUT {place}/s"):  # and the system's words, so not golden
            write_store(tiny_vae, Pictures(), Path(place) / "s", **SETTINGS)


# --- behind its back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["safetensors", "parquet", "arrow"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_is_named_and_repaired_to_the_same_bytes(
    store: Path, tiny_vae: AutoencoderKL, extension: str, damage: Any
) -> None:
    before = tree(store)
    file = f"shards/00000001.{extension}"
    damage(store / file)
    assert [problem.file for problem in verify(store)] == [file]
    if extension == "safetensors":
        done = mend(store, tiny_vae, Pictures(bad=(9,)))
        assert done == Repaired(encoded_units=(1,))
    else:
        assert repair(store, vae=never, source=never) == Repaired(copied=(file,))
    assert tree(store) == before and verify(store) == []


def test_a_shard_of_clips_is_encoded_again_from_their_films(tmp_path: Path) -> None:
    films, vae = write_films(tmp_path / "films", 8, damaged=(5,)), tiny("AutoencoderKLWan")
    store = tmp_path / "s"
    write_store(vae, open_images(films, vae, frames=5), store, **SETTINGS | {"shard_size": 4})
    before = tree(store)
    one, other = sorted((store / "shards").glob("00000001-*.safetensors"))  # of images, of clips
    truncate(one)
    flip_a_bit(other)
    assert {problem.file for problem in verify(store)} == {f"shards/{path.name}" for path in (one, other)}
    assert mend(store, vae, open_images(films, vae, frames=5)) == Repaired(encoded_units=(1,))
    assert tree(store) == before and verify(store) == []


def test_everything_of_a_shard_lost(store: Path, tiny_vae: AutoencoderKL) -> None:
    before = tree(store)
    for path in (store / "shards").glob("00000002.*"):
        path.unlink()
    assert len(verify(store)) == 3
    assert mend(store, tiny_vae, Pictures(bad=(9,))).encoded_units == (2,)
    assert tree(store) == before


def test_a_sound_store_needs_no_repair(store: Path) -> None:
    before = tree(store)
    (store / "shards" / f".00000000.parquet.0123456789abcdef{atomic_io.TEMPORARY_SUFFIX}").write_bytes(
        b"left by a kill"
    )
    assert repair(store, vae=never, source=never) == Repaired()
    assert tree(store) == before


def test_a_shard_truncated_before_the_end_is_done_again(
    store: Path, tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    shutil.copytree(store, out)
    manifest = read_manifest(out)
    unfinished = manifest.model_copy(
        update={"complete": False, "shards": (), "samples": 0, "units": 0, "settings": (), "statistics": None}
    )
    unfinished = unfinished.model_copy(update={"quarantined": 0, "columns": {}})
    (out / "manifest.json").write_bytes(unfinished.to_bytes())
    truncate(out / "shards" / "00000000.safetensors")
    (out / "units" / "00000002.json").write_text("{")
    write_store(tiny_vae, Pictures(bad=(9,)), out, **SETTINGS)
    assert tree(out) == tree(store)


def test_a_lost_manifest_is_made_again_by_the_same_command(store: Path, tiny_vae: AutoencoderKL) -> None:
    before = tree(store)
    times = {path: path.stat().st_mtime_ns for path in (store / "shards").iterdir()}
    truncate(store / "manifest.json")
    with pytest.raises(WorkError, match=r"manifest\.json"):  # and json's words, so not golden
        write_store(tiny_vae, Pictures(bad=(9,)), store, **SETTINGS)
    (store / "manifest.json").unlink()
    (store / "quarantine.jsonl").unlink()
    write_store(tiny_vae, Pictures(bad=(9,)), store, **SETTINGS)
    assert tree(store) == before
    assert {path: path.stat().st_mtime_ns for path in (store / "shards").iterdir()} == times, "nothing is encoded again"


def test_units_of_another_identity_do_not_count(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Somebody deletes the manifest and encodes with another VAE into what is left."""
    with torch.no_grad():
        tiny_vae.encoder.conv_in.bias[0] += 1.0
    write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "other", **SETTINGS)
    (store / "manifest.json").unlink()
    (store / "quarantine.jsonl").unlink()
    write_store(tiny_vae, Pictures(bad=(9,)), store, **SETTINGS)
    assert tree(store) == tree(tmp_path / "other")


def test_repair_after_an_update_finds_images_by_key(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    out = tmp_path / "s"
    write_store(tiny_vae, Album(bad=(4,)), out, **SETTINGS)
    write_store(tiny_vae, Album(**AFTER), out, **SETTINGS, update=True)
    expected = contents(out)
    for name in ("00000000", "00000003"):
        flip_a_bit(out / "shards" / f"{name}.safetensors")
    done = mend(out, tiny_vae, Album(**AFTER))
    assert done == Repaired(encoded_units=(0, 3)) and verify(out) == []
    found = contents(out)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_repair_says_what_cannot_be_brought_back(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    out = tmp_path / "s"
    write_store(tiny_vae, Album(), out, **SETTINGS)
    flip_a_bit(out / "shards" / "00000001.safetensors")
    done = mend(out, tiny_vae, Album(numbers=tuple(n for n in range(20) if n != 9), content={12: 99}))
    assert done == Repaired(encoded_units=(1,), lost=("img_009", "img_012"))
    assert contents(out).keys() == names(set(range(20)) - {9, 12})
    now = Album(numbers=tuple(n for n in range(20) if n != 9), content={12: 99})
    write_store(tiny_vae, now, out, **SETTINGS, update=True)
    assert contents(out).keys() == names(set(range(20)) - {9}) and verify(out) == []


def test_repair_needs_a_finished_store_and_the_right_vae(tmp_path: Path) -> None:
    with refused(UsageError, str(tmp_path)):
        repair(tmp_path, vae=never, source=never)


# --- encoding again ---------------------------------------------------------------------------------------------------


def test_random_samples_encoded_again_give_the_same_bits(store: Path, tiny_vae: AutoencoderKL) -> None:
    found = reencode(store, read_manifest(store), tiny_vae, Pictures(bad=(9,)), 12)
    assert (found.samples, found.identical, found.worst, found.problems) == (12, 12, 0.0, ())
    everything = reencode(store, read_manifest(store), tiny_vae, Pictures(bad=(9,)), 10**6)
    assert everything.samples == everything.identical == 20


def test_encoding_again_finds_wrong_rows_and_changed_images(store: Path, tiny_vae: AutoencoderKL) -> None:
    class Retouched(Pictures):
        def pixels(self, index: int) -> Any:
            return super().pixels(index + 100 if index == 3 else index)

    found = reencode(store, read_manifest(store), tiny_vae, Retouched(bad=(9,)), 20)
    assert [problem.what for problem in found.problems] == ["row 3 (folder/img_003.png): image has changed"]
    found = reencode(store, read_manifest(store), tiny_vae, Pictures(18), 20)
    assert [problem.what.partition(":")[0] for problem in found.problems] == [
        f"row {row} (folder/img_{row + 16:03d}.png)" for row in (2, 3, 4)
    ]
    with torch.no_grad():
        tiny_vae.quant_conv.bias += 0.5
    found = reencode(store, read_manifest(store), tiny_vae, Pictures(bad=(9,)), 5)
    assert found.identical == 0 and len(found.problems) == 5 and "standard deviations" in found.problems[0].what


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"version https://git-lfs", b"[1]\n", b'{"index": 0, "key": 1}', b"[" * 100_000]
)
def test_a_damaged_quarantine_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "quarantine.jsonl").write_bytes(content)
    with refused(WorkError, "quarantine.jsonl") as refusal:
        read_quarantine(tmp_path)
    assert "\n" not in str(refusal.value)
