"""Updates by key and image checksum; stopped updates; bad images tried again."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import tree
from diffusers import AutoencoderKL
from fork_server import fork, forkserver
from sentences import refused
from store_sources import AFTER, Album, Stop, Stopping, names
from stores import SETTINGS, contents, encode, equal

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import LatentDataset, LatentStatistics, read_manifest, verify, write_store
from ldm_vae.latent_store.format.layout import PLAN
from ldm_vae.latent_store.write.processes import Processes


@pytest.fixture
def store(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    encode(tiny_vae, Album(bad=(4,)), tmp_path / "s")
    return tmp_path / "s"


MUCH = {**AFTER, "numbers": (*AFTER["numbers"], *range(200, 240))}  # enough units for several processes


def test_an_update_is_what_a_fresh_store_would_hold(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    before = tree(store / "shards")
    encode(tiny_vae, Album(**AFTER), store, update=True)
    encode(tiny_vae, Album(**AFTER), tmp_path / "fresh")
    assert equal(store, tmp_path / "fresh")
    after = tree(store / "shards")
    assert {name: after[name] for name in before} == before, "nothing that was there is touched"
    assert sorted(set(after) - set(before)) == [f"00000003.{end}" for end in ("arrow", "parquet", "safetensors")]
    manifest, fresh = read_manifest(store), read_manifest(tmp_path / "fresh")
    assert {shard.name: shard.removed for shard in manifest.shards if shard.removed} == {
        "00000000": (2, 4, 5),  # rows: image 4 has none
        "00000001": (4,),
        "00000002": (2,),
    }
    assert manifest.source == fresh.source and not (store / PLAN).exists()
    lines = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["index"], line["key"]) for line in lines] == [(4, "img_004"), (17, "img_101")]
    assert manifest.quarantined == 2
    one, other = (LatentStatistics.from_json(m.statistics or {}) for m in (manifest, fresh))
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-12, atol=0.0)
    # an image has the same bootstrap weights wherever it lies: even the intervals agree
    assert (one.intervals or {})["scaling_factor"] == pytest.approx((other.intervals or {})["scaling_factor"])
    assert verify(store) == []
    encode(tiny_vae, Album(**AFTER), store)  # and it is finished
    assert tree(store / "shards") == after


def one_of_several(store: str, vae: str, barrier: Any, rank: int) -> None:
    """A process of an update, in a process of its own."""
    torch.set_num_threads(1)
    processes = Processes(rank, 3, barrier.wait)
    encode(AutoencoderKL.from_pretrained(vae).eval(), Album(**MUCH), Path(store), update=True, processes=processes)


@pytest.mark.slow
def test_an_update_by_three_processes_is_that_of_one(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    tiny_vae.save_pretrained(tmp_path / "vae")
    shutil.copytree(store, tmp_path / "alone")
    encode(tiny_vae, Album(**MUCH), tmp_path / "alone", update=True)
    barrier = forkserver().Barrier(3, timeout=300)
    call = partial(one_of_several, str(store), str(tmp_path / "vae"), barrier)
    for done in [rank.wait() for rank in [fork(partial(call, rank), []) for rank in range(3)]]:
        assert done.returncode == 0, done.stderr
    assert tree(store) == tree(tmp_path / "alone")
    assert len(list((store / "units").glob("*.json"))) >= 3 + 5


def test_an_update_of_nothing_changes_nothing(store: Path, tiny_vae: AutoencoderKL) -> None:
    before = tree(store)
    encode(tiny_vae, Album(bad=(4,)), store, update=True)
    assert tree(store) == before


def test_without_update_a_changed_source_is_refused(store: Path, tiny_vae: AutoencoderKL) -> None:
    with refused(UsageError, "--update"):
        encode(tiny_vae, Album(**AFTER), store)
    with refused(UsageError, "--update"):
        encode(tiny_vae, Album(**AFTER), store, retry_quarantined=True)


def test_the_same_key_twice_changed_and_changed_back(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    for content in ({3: 50}, {3: 60}, {}):
        encode(tiny_vae, Album(bad=(4,), content=content), store, update=True)
    encode(tiny_vae, Album(bad=(4,)), tmp_path / "fresh")
    assert equal(store, tmp_path / "fresh")
    assert read_manifest(store).units == 6


def test_removing_everything_is_an_error_and_an_order_is_no_change(store: Path, tiny_vae: AutoencoderKL) -> None:
    backwards = tuple(reversed(range(20)))
    encode(tiny_vae, Album(numbers=backwards, bad=(4,)), store, update=True)
    assert read_manifest(store).units == 3 and contents(store).keys() == names(set(range(20)) - {4})
    with refused(WorkError, "img_004"):
        encode(tiny_vae, Album(numbers=(4,), bad=(4,)), store, update=True)


def test_a_stopped_update_goes_on_and_a_reader_sees_the_old_store_meanwhile(
    store: Path, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    whole, keys = tmp_path / "whole", contents(store).keys()
    many = {"numbers": tuple(range(45)), "bad": (4,)}
    encode(tiny_vae, Album(bad=(4,)), whole)
    encode(tiny_vae, Album(**many), whole, update=True)
    for after in (10, 50, 12):  # while comparing, in the first new unit, in the second
        with pytest.raises(Stop):
            encode(tiny_vae, Stopping(**many, after=after), store, update=True)
        assert contents(store).keys() == keys
    assert (store / PLAN).exists()
    encode(tiny_vae, Album(**many), store)  # goes on by itself: the plan says what is to be done
    assert tree(store) == tree(whole)


def test_a_stopped_update_that_is_overtaken_starts_anew(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        encode(tiny_vae, Stopping(numbers=tuple(range(60)), bad=(4,), after=90), store, update=True)
    assert (store / PLAN).exists() and len(list((store / "units").iterdir())) > 3
    encode(tiny_vae, Album(**AFTER), store, update=True)
    encode(tiny_vae, Album(**AFTER), tmp_path / "fresh")
    assert equal(store, tmp_path / "fresh") and verify(store) == []


def test_a_store_that_was_never_finished_takes_up_a_changed_source(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(**AFTER), tmp_path / "fresh")
    for after in (2, 14):  # before the first unit is done, and after
        out = tmp_path / f"s{after}"
        with pytest.raises(Stop):
            encode(tiny_vae, Stopping(bad=(4,), after=after), out)
        with refused(UsageError, "OUT"):
            encode(tiny_vae, Album(**AFTER), out)
        encode(tiny_vae, Album(**AFTER), out, update=True)
        assert equal(out, tmp_path / "fresh") and verify(out) == []


def test_bad_images_are_tried_again_when_asked_or_when_their_bytes_change(store: Path, tiny_vae: AutoencoderKL) -> None:
    with refused(UsageError, "img_004"):  # its bytes have changed
        encode(tiny_vae, Album(), store)
    assert "img_004" not in contents(store)
    encode(tiny_vae, Album(broken=(4,)), store, retry_quarantined=True)
    assert read_manifest(store).quarantined == 1 and '"cannot be read"' in (store / "quarantine.jsonl").read_text()
    encode(tiny_vae, Album(), store, update=True)
    assert contents(store).keys() == names(range(20)) and read_manifest(store).quarantined == 0
    assert (store / "quarantine.jsonl").read_text() == "" and verify(store) == []


def test_an_image_that_cannot_be_read_now_keeps_its_latents(
    store: Path, tiny_vae: AutoencoderKL, caplog: pytest.LogCaptureFixture
) -> None:
    encode(tiny_vae, Album(bad=(4,), broken=(7, 8)), store, update=True)
    assert contents(store).keys() == names(set(range(20)) - {4})
    assert "2 images cannot be read now and keep the latents that they have" in caplog.text


def test_several_resolutions_are_updated_together(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    settings = {**SETTINGS, "resolution": (16, 8)}
    for out, first in ((tmp_path / "s", True), (tmp_path / "fresh", False)):
        if first:
            write_store(tiny_vae, Album(bad=(4,)), out, **settings)
        write_store(tiny_vae, Album(**AFTER), out, **settings, update=first)
    seen = []
    for out in (tmp_path / "s", tmp_path / "fresh"):
        data = LatentDataset(out, raw=True)
        items = [data[index] for index in range(len(data))]
        seen.append({(item["key"], item["resolution"]): item["mean"] for item in items})
        assert len(seen[-1]) == len(items)
    assert seen[0].keys() == seen[1].keys() and all(torch.equal(seen[0][k], seen[1][k]) for k in seen[0])
