"""`ldm-vae store merge` and `split`: the same rows in other folders, every image once, damage never copied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from sentences import refused
from store_sources import Album, Pictures
from stores import SETTINGS, contents, encode, equal
from tiny_networks import vq_model

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.source import Record
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.maintain.merge_split import (
    merge,
    split,
    take_samples,
    take_where,
)
from ldm_vae.latent_store.maintain.repair import repair


def shard_files(store: Path) -> dict[str, str]:
    return tree(store / "shards")


def test_what_is_split_and_merged_again_has_the_bytes_it_had(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(21), tmp_path / "s", **SETTINGS, views="flip", pixels=True)
    parts = split(tmp_path / "s", tmp_path / "parts", 2)
    assert [len(LatentDataset(part)) for part in parts] == [16, 5]
    merged = merge(parts, tmp_path / "m")
    assert shard_files(tmp_path / "m") == shard_files(tmp_path / "s")
    before = read_manifest(tmp_path / "s")
    assert (merged.statistics, merged.shards, merged.columns) == (before.statistics, before.shards, before.columns)
    assert merged.source == before.source and verify(tmp_path / "m") == []


def test_several_resolutions_and_indices_round_trip(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    settings = SETTINGS | {"resolution": (8, 16)}
    for name, vae, more in (("kl", tiny_vae, settings), ("vq", vq_model(), SETTINGS)):
        write_store(vae, Pictures(20), tmp_path / name, **more)
        merged = merge(split(tmp_path / name, tmp_path / f"{name}-parts", 3), tmp_path / f"{name}-merged")
        assert shard_files(tmp_path / f"{name}-merged") == shard_files(tmp_path / name)
        assert merged.statistics == read_manifest(tmp_path / name).statistics


def test_an_image_that_two_stores_hold_is_there_once(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(numbers=tuple(range(12)), bad=(3, 9)), tmp_path / "a")
    encode(tiny_vae, Album(numbers=tuple(range(8, 20)), bad=(11,)), tmp_path / "b")
    encode(tiny_vae, Album(), tmp_path / "all")
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    found, whole = contents(tmp_path / "m"), contents(tmp_path / "all")  # contents: no key twice
    assert found.keys() == whole.keys() - {"img_003"}  # 9 and 11 are bad in one store and sound in the other
    assert all(torch.equal(found[key], whole[key]) for key in found)
    assert merged.samples == 19 and merged.quarantined == 1 and merged.source.samples == 20
    encode(tiny_vae, Album(bad=(3,)), tmp_path / "m", update=True)  # goes on as any store does
    assert contents(tmp_path / "m").keys() == found.keys() and verify(tmp_path / "m") == []


@dataclass
class Renamed(Album):
    """The same pictures, one of them under another caption."""

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return replace(record, columns={"caption": "another"}) if record.key == "img_009" else record


def test_of_two_captions_of_one_image_none_is_dropped(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(numbers=tuple(range(12))), tmp_path / "a")
    encode(tiny_vae, Renamed(numbers=tuple(range(8, 20))), tmp_path / "b")
    with refused(UsageError, "caption") as error:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert "img_009" in str(error.value)


def test_compacting_gives_back_what_an_update_took_out(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(), tmp_path / "s")
    encode(tiny_vae, Album(numbers=tuple(range(2, 20)), content={5: 99}), tmp_path / "s", update=True)
    assert any(shard.removed for shard in read_manifest(tmp_path / "s").shards)
    compact = merge([tmp_path / "s"], tmp_path / "c")
    assert not any(shard.removed for shard in compact.shards) and compact.samples == 18
    assert equal(tmp_path / "c", tmp_path / "s")
    np.testing.assert_allclose(  # the same sums in another order
        np.array((compact.statistics or {})["variance"]),
        np.array((read_manifest(tmp_path / "s").statistics or {})["variance"]),
        rtol=1e-12,
    )


def test_rows_and_values_are_chosen(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(21), tmp_path / "s", **SETTINGS)
    assert take_samples(tmp_path / "s", tmp_path / "rows", 6, 18).samples == 12
    whole, some = LatentDataset(tmp_path / "s", raw=True), LatentDataset(tmp_path / "rows", raw=True)
    assert all(torch.equal(some[i]["mean"], whole[i + 6]["mean"]) for i in range(12))
    take_where(tmp_path / "s", tmp_path / "label", [("label", "2")])
    labels = LatentDataset(tmp_path / "label")
    assert [labels[i]["key"] for i in range(len(labels))] == [whole[i]["key"] for i in range(2, 21, 3)]
    assert take_where(tmp_path / "s", tmp_path / "tag", [("tags", "t7"), ("label", "1")]).samples == 1
    for bad, field in (
        (lambda: take_where(tmp_path / "s", tmp_path / "x", [("label", "7")]), "OUT"),
        (lambda: take_where(tmp_path / "s", tmp_path / "x", [("lable", "7")]), "lable"),
        (lambda: take_samples(tmp_path / "s", tmp_path / "x", 3, 22), "--rows"),
        (lambda: split(tmp_path / "s", tmp_path / "x", 4), "--parts"),
        (lambda: merge([tmp_path / "s"], tmp_path / "tag"), "OUT"),
    ):
        with refused(UsageError, field):
            bad()
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_one_store_is_refused_and_damage_is_not_copied(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(), tmp_path / "a")
    encode(tiny_vae, Album(content={4: 50}), tmp_path / "b")
    write_store(tiny_vae, Album(), tmp_path / "c", **SETTINGS | {"shard_size": 4}, dtype="fp32")
    with refused(UsageError, "img_004"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    with refused(UsageError, "dtype") as error:
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "m")
    assert "fp16 and fp32; shard_size 8 and 4" in str(error.value)
    shard = tmp_path / "a" / "shards" / "00000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with refused(WorkError, "shards/00000001.safetensors"):
        merge([tmp_path / "a"], tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # and nothing half-written


def test_a_merged_store_is_repaired_by_key_and_keeps_its_order(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(numbers=tuple(range(8, 20))), tmp_path / "a")
    encode(tiny_vae, Album(numbers=tuple(range(12))), tmp_path / "b")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")  # 8 to 19, then 0 to 7
    before = contents(tmp_path / "m")
    for path in (tmp_path / "m" / "shards").glob("0000000[12].safetensors"):
        path.unlink()
    everything = Album()
    done = repair(tmp_path / "m", vae=lambda: tiny_vae, source=lambda: everything)
    assert (done.encoded_units, done.lost) == ((1, 2), ()) and verify(tmp_path / "m") == []
    after = contents(tmp_path / "m")
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    (tmp_path / "m" / "shards" / "00000001.safetensors").unlink()
    done = repair(tmp_path / "m", vae=lambda: tiny_vae, source=lambda: Album(numbers=tuple(range(18))))
    assert done.lost == ("img_018", "img_019")  # of the damaged unit, what those images do not hold
    assert contents(tmp_path / "m").keys() == before.keys() - set(done.lost)


def test_as_a_user_calls_it(tiny_vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tiny_vae, Pictures(16), tmp_path / "s", **SETTINGS)
    assert run_cli("store", "split", tmp_path / "s", tmp_path / "parts", "--parts", 2) == 0
    assert run_cli("store", "merge", tmp_path / "parts" / "0", tmp_path / "parts" / "1", tmp_path / "m") == 0
    assert "16 samples" in capsys.readouterr().out
    assert shard_files(tmp_path / "m") == shard_files(tmp_path / "s")
    assert run_cli("store", "split", tmp_path / "s", tmp_path / "x", "--rows", "two") == 2
    assert "--rows: expected FIRST:STOP" in capsys.readouterr().err
