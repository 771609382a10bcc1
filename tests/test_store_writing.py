"""The store's writer: exactly once, resumable, refusing to mix, and never half-written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import tree
from diffusers import AutoencoderKL
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS
from tiny_classes import tiny
from videos import write_films

from ldm_vae import open_images
from ldm_vae.autoencoder.latents import encode
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.inventory import take_inventory
from ldm_vae.data.transforms import centre_crop, to_pixels
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.write.processes import Processes


@pytest.fixture(params=["pictures", "films"])
def material(request: pytest.FixtureRequest, tiny_vae: AutoencoderKL, tmp_path: Path) -> tuple[Any, Any, set[int]]:
    """A network, a source, and the indices of it that cannot be used; films are clips of five frames and images."""
    if request.param == "pictures":
        return tiny_vae, Pictures(bad=(5, 11), broken=(17,)), {5, 11, 17}
    films = write_films(tmp_path / "films", 12, damaged=(5, 6), short=(8,))
    vae = tiny("AutoencoderKLWan")
    source = open_images(films, vae, frames=5)
    return vae, source, {index for index in range(len(source)) if source.key(index)[5:7] in ("05", "06", "08")}


@pytest.fixture(autouse=True)
def _silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_stored_is_what_the_encoder_gives(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    source = Pictures()
    write_store(tiny_vae, source, tmp_path / "s", **SETTINGS, dtype="fp32", source_name="here")
    data = LatentDataset(tmp_path / "s", raw=True)
    assert len(data) == 21
    crops = [centre_crop(torch.from_numpy(source.pixels(i)).permute(2, 0, 1), 16) for i in range(21)]
    with torch.no_grad():
        moments = encode(tiny_vae, to_pixels(torch.stack([crop.pixels for crop in crops[:4]])))
    for index in range(4):
        assert torch.equal(data[index]["mean"], moments.mean[index])
        assert torch.equal(data[index]["logvar"], moments.logvar[index])
    item = data[20]
    assert item["key"] == "folder/img_020.png" and item["caption"] == "picture 20" and item["tags"] == ["t20", "x"]
    assert item["source"] == "here" and item["original_size"] == [24, 20] and item["label"] == 2
    assert item["crop_box"] == list(crops[20].box) and item["bucket"] == "16x16"
    assert len(item["image_sha256"]) == 64
    assert verify(tmp_path / "s") == []


def test_one_process_two_and_three_give_the_same_bytes(material: tuple[Any, Any, set[int]], tmp_path: Path) -> None:
    vae, source, bad = material
    for name, ranks, threads in (("one", 1, 1), ("two", 2, 2), ("three", 3, 1)):
        for rank in reversed(range(ranks)):  # rank 0 finishes
            own = {"processes": Processes(rank, ranks), "encode_threads": threads}
            write_store(vae, source, tmp_path / name, **SETTINGS, **own)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")
    manifest = read_manifest(tmp_path / "one")
    assert (manifest.samples, manifest.quarantined, manifest.complete) == (len(source) - 3, 3, True)
    lines = [json.loads(line) for line in (tmp_path / "one" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == sorted(bad)
    if isinstance(source, Pictures):
        assert lines[2]["reason"] == "cannot be read" and lines[2]["image_sha256"] is None
    else:
        assert "3 of the 5 of a clip" in lines[2]["reason"] and len({line["reason"] for line in lines}) == 3
    data = LatentDataset(tmp_path / "one")
    wanted = [source.key(index) for index in range(len(source)) if index not in bad]
    keys = [data[index]["key"] for index in range(len(data))]
    # a unit's rows of several lengths are in shards of their own
    assert (keys if isinstance(source, Pictures) else sorted(keys)) == wanted


def test_decoding_processes_change_nothing(material: tuple[Any, Any, set[int]], tmp_path: Path) -> None:
    vae, source, _ = material
    for name, workers in (("inline", 0), ("workers", 2)):
        write_store(vae, source, tmp_path / name, **SETTINGS, num_workers=workers)
    assert tree(tmp_path / "inline") == tree(tmp_path / "workers")


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", 7, "b"]], ids=["twice", "no text"])
def test_keys_that_cannot_name_one_image_each_are_refused_before_anything_is_written(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[Any]
) -> None:
    source = Pictures(count=3)
    monkeypatch.setattr(source, "key", names.__getitem__)
    for start in (lambda: write_store(tiny_vae, source, tmp_path / "s", **SETTINGS), lambda: take_inventory(source)):
        with refused(UsageError, "data"):
            start()
    assert not list(tmp_path.glob("s/*"))


def test_a_finished_store_is_left_alone(material: tuple[Any, Any, set[int]], tmp_path: Path) -> None:
    vae, source, _ = material
    write_store(vae, source, tmp_path / "s", **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()}
    write_store(vae, source, tmp_path / "s", **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


def test_another_identity_is_refused_with_the_difference_named(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS)
    before = tree(tmp_path / "s")
    with refused(UsageError, "resolution") as error:
        write_store(tiny_vae, Pictures(), tmp_path / "s", **{**SETTINGS, "resolution": 8})
    assert "[16], not [8]" in str(error.value)
    with refused(UsageError, "dtype") as error:
        write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS, dtype="fp32")
    assert "fp16, not fp32" in str(error.value)
    with refused(UsageError, "preprocessing"):
        write_store(tiny_vae, Pictures(decoding=Decoding(background=(0, 0, 0))), tmp_path / "s", **SETTINGS)
    with refused(UsageError, "DATA") as error:
        write_store(tiny_vae, Pictures(20), tmp_path / "s", **SETTINGS)
    assert "21 of them, DATA has 20" in str(error.value)
    with torch.no_grad():
        tiny_vae.encoder.conv_in.bias[0] += 1e-3
    with refused(UsageError, "encoder"):
        write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS)
    assert tree(tmp_path / "s") == before


def test_a_new_decoder_keeps_the_store_valid(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS)
    before = tree(tmp_path / "s" / "shards")
    with torch.no_grad():
        tiny_vae.decoder.conv_out.bias += 1.0
    write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS)
    assert tree(tmp_path / "s" / "shards") == before


def test_nothing_usable_and_too_much_bad_are_errors_that_leave_no_finished_store(
    tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    with refused(WorkError, "image") as error:
        write_store(tiny_vae, Pictures(3, bad=(0, 1, 2)), tmp_path / "none", **SETTINGS)
    assert "among 3" in str(error.value)
    with refused(WorkError, "max_bad") as error:
        write_store(tiny_vae, Pictures(10, bad=(0, 4)), tmp_path / "many", **SETTINGS, max_bad=0.1)
    assert "2 of 10" in str(error.value)
    assert not read_manifest(tmp_path / "many").complete
    with refused(UsageError, str(tmp_path / "many")):
        LatentDataset(tmp_path / "many")
    write_store(tiny_vae, Pictures(10, bad=(0, 4)), tmp_path / "many", **SETTINGS, max_bad=0.5)
    assert len(LatentDataset(tmp_path / "many")) == 8


def test_a_folder_of_something_else_is_refused(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark and stormy night.")
    with refused(UsageError, "OUT"):
        write_store(tiny_vae, Pictures(), tmp_path / "thesis", **SETTINGS)
    with refused(UsageError, "OUT"):
        write_store(tiny_vae, Pictures(), tmp_path / "thesis" / "chapter1.tex", **SETTINGS)
    assert sorted(path.name for path in (tmp_path / "thesis").iterdir()) == ["chapter1.tex"]


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("store", ["moments", "mean", "sample"])
def test_every_kind_and_dtype_reads_back(tiny_vae: AutoencoderKL, tmp_path: Path, store: Any, dtype: Any) -> None:
    write_store(tiny_vae, Pictures(5), tmp_path / "s", **SETTINGS, store=store, dtype=dtype)
    write_store(tiny_vae, Pictures(5), tmp_path / "exact", **SETTINGS, store=store, dtype="fp32")
    item, exact = LatentDataset(tmp_path / "s", raw=True)[3], LatentDataset(tmp_path / "exact", raw=True)[3]
    names = {"moments": {"mean", "logvar"}, "mean": {"mean"}, "sample": {"sample"}}[store]
    rounding = {"fp16": 2**-10, "fp32": 0.0, "bf16": 2**-7}[dtype]
    for name in names:
        assert item[name].dtype == torch.float32
        torch.testing.assert_close(item[name], exact[name], rtol=rounding, atol=1e-7)
    assert LatentDataset(tmp_path / "s")[3]["latents"].shape == (4, 8, 8)
    assert verify(tmp_path / "s") == []
