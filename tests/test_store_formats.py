"""Latent stores in other programs' formats and back: what comes back is what went out, or it is said what is lost."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS, shard_files
from tiny_networks import vq_model

from ldm_vae import load_autoencoder
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.commands.store import FOR_A_MODEL, Format, Model, Names
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
from ldm_vae.latent_store.convert.formats import Options, finetrainers, kohya, musubi, names
from ldm_vae.latent_store.maintain.merge_split import merge
from ldm_vae.latent_store.maintain.repair import repair

KOHYA = Options(model="sdxl")
IMAGE_FORMATS = [name for name in names() if name not in ("musubi", "finetrainers")]  # test_store_formats_clips.py


@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_everything_comes_back(name: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "views": (tiny_vae, {"views": "flip", "pixels": True}),
        "bf16": (tiny_vae, {"dtype": "bf16", "resolution": (8, 16)}),
        "mean": (tiny_vae, {"store": "mean", "dtype": "fp32", "bucket_step": 4}),
        "codes": (vq_model(), {}),
    }
    for case, (vae, more) in cases.items():
        store = tmp_path / case
        write_store(vae, Pictures(11, bad=(10,)), store, **SETTINGS | more, vae_name="a-vae")
        convert_to(store, tmp_path / f"{case}-out", name)
        convert_to(store, tmp_path / f"{case}-again", name)
        assert tree(tmp_path / f"{case}-out") == tree(tmp_path / f"{case}-again")
        back, _ = convert_from(tmp_path / f"{case}-out", tmp_path / f"{case}-back", name)
        assert shard_files(tmp_path / f"{case}-back") == shard_files(store), case
        assert back == read_manifest(store) and back.quarantined == 1
        assert verify(tmp_path / f"{case}-back") == []


def test_datasets_loads_the_parquet(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(11), tmp_path / "s", **SETTINGS)
    convert_to(tmp_path / "s", tmp_path / "out", "parquet")
    data = LatentDataset(tmp_path / "s", raw=True)
    for where in ({"data_files": str(tmp_path / "out" / "*.parquet")}, {"data_dir": str(tmp_path / "out")}):
        loaded = datasets.load_dataset("parquet", split="train", cache_dir=str(tmp_path / "cache"), **where)
        assert isinstance(loaded.features["mean"], datasets.Array3D) and loaded["key"][:] == [
            item["key"] for item in data
        ]
        rows = loaded.with_format("torch")
        for index in (0, 10):
            assert torch.equal(rows[index]["mean"], data[index]["mean"])
            assert torch.equal(rows[index]["logvar"], data[index]["logvar"])
        assert rows[10]["caption"] == "picture 10" and loaded[10]["tags"] == ["t10", "x"]


def test_tar_members_are_as_webdataset_groups_them(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS)
    convert_to(tmp_path / "s", tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "00000000.tar") as archive:
        infos = archive.getmembers()
        mean = np.load(io.BytesIO(archive.extractfile(infos[0]).read()))
    assert [info.name for info in infos[:3]] == [
        f"folder%2Fimg_000%2Epng.{x}" for x in ("mean.npy", "logvar.npy", "json")
    ]
    assert {(info.mtime, info.uid, info.uname, info.mode) for info in infos} == {(0, 0, "", 0o644)}
    np.testing.assert_array_equal(mean, LatentDataset(tmp_path / "s", raw="mean")[0]["mean"].numpy())


# --- formats that hold one sample -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lightningdit", "kohya"])
def test_samples_come_back_bit_by_bit(name: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    options = KOHYA if name == "kohya" else None
    cases: list[dict[str, Any]] = [{"store": "sample", "views": "flip"}, {"store": "mean", "dtype": "bf16"}]
    if name == "kohya":
        cases.append({"store": "mean", "dtype": "fp32", "resolution": (8, 16)})
    for number, more in enumerate(cases):
        store, out, back = (tmp_path / f"{number}-{what}" for what in ("s", "out", "back"))
        write_store(tiny_vae, Pictures(11), store, **SETTINGS | more)
        convert_to(store, out, name, options)
        manifest, _ = convert_from(out, back, name)
        assert shard_files(back) == shard_files(store)
        assert manifest == read_manifest(store)


def test_lightningdits_reader_finds_what_it_reads(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(19), tmp_path / "s", **SETTINGS, views="flip")
    lost = convert_to(tmp_path / "s", tmp_path / "out", "lightningdit")
    assert lost[0].startswith("logvar") and not any("mirrored" in phrase for phrase in lost)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))  # as its reader lists them
    assert [shard.name for shard in shards] == [f"latents_rank00_shard00{n}.safetensors" for n in range(3)]
    read = [load_file(shard) for shard in shards]
    assert torch.cat([shard["labels"] for shard in read]).tolist() == [index % 3 for index in range(19)]
    data = LatentDataset(tmp_path / "s", raw=True)
    z, mirrored = (torch.cat([shard[name] for shard in read]) for name in ("latents", "latents_flip"))
    assert z.dtype == torch.float32 and not torch.equal(z, mirrored)
    noise = (z - torch.stack([item["mean"] for item in data])) / torch.stack([item["logvar"] for item in data]).div(
        2
    ).exp()
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    stats = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 4, 1, 1)
    whitened = (torch.cat([z, mirrored]) - stats["mean"]) / stats["std"]
    assert float(whitened.std(dim=(0, 2, 3)).sub(1).abs().max()) < 0.05
    back, _ = convert_from(tmp_path / "out", tmp_path / "b", "lightningdit")
    assert (back.identity.store, back.identity.dtype, back.identity.views) == ("sample", "fp32", ("", "flip"))
    again = LatentDataset(tmp_path / "b", raw=True, view="flip")
    assert torch.equal(torch.stack([item["sample"] for item in again]), mirrored)
    assert [item["caption"] for item in again] == [item["caption"] for item in data]


def test_it_is_said_what_has_no_place(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(vq_model(), Pictures(3), tmp_path / "codes", **SETTINGS)
    write_store(
        tiny_vae, Pictures(3), tmp_path / "two", **SETTINGS | {"resolution": (8, 16)}, views="ten_crop", pixels=True
    )
    for name in ("lightningdit", "kohya"):
        with refused(UsageError, "--to"):
            convert_to(tmp_path / "codes", tmp_path / "x", name, KOHYA)
    with refused(UsageError, "latents"):
        convert_to(tmp_path / "two", tmp_path / "x", "lightningdit")
    lost = " ".join(convert_to(tmp_path / "two", tmp_path / "k", "kohya", KOHYA))
    for phrase in ("logvar", "top_left, top_left.flip", "pixels", "captions"):
        assert phrase in lost
    assert not (tmp_path / "x").exists()
    with refused(UsageError, "OUT"):
        convert_to(tmp_path / "codes", tmp_path / "k", "parquet")


# --- latents of others ------------------------------------------------------------------------------------------------


def strangers(folder: Path, name: str, latents: torch.Tensor) -> Path:
    """Latents as another program leaves them: without any of ours beside."""
    folder.mkdir()
    if name == "parquet":
        lists = pa.array(latents.tolist(), pa.list_(pa.list_(pa.list_(pa.float32()))))
        pq.write_table(pa.table({"caption": ["a"] * len(latents), "latents": lists}), folder / "x.parquet")
    elif name == "webdataset":
        with tarfile.open(folder / "x.tar", "w") as archive:
            for number, z in enumerate(latents):
                file = io.BytesIO()
                np.save(file, z.numpy())
                info = tarfile.TarInfo(f"dir/{number}.latents.npy")
                info.size = file.tell()
                archive.addfile(info, io.BytesIO(file.getvalue()))
    elif name == "lightningdit":
        save_file({"latents": latents, "labels": torch.arange(len(latents))}, folder / "x.safetensors")
        (folder / "latents_stats.pt").write_bytes(b"never opened")
    else:
        for number, z in enumerate(latents):
            crop = [0, 0, 2 * z.shape[2], 2 * z.shape[1]]  # f = 2, and an image that fills its bucket
            np.savez(folder / f"{number}.npz", latents=z.numpy(), original_size=[30, 20], crop_ltrb=crop)
        np.savez(folder / "0_te.npz", hidden=np.zeros(3))
    return folder


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_a_strangers_latents_need_a_vae_and_stay_a_claim(name: str, tiny_vae_folder: Path, tmp_path: Path) -> None:
    latents = torch.randn(5, 4, 8, 6)
    source = strangers(tmp_path / "theirs", name, latents)
    with refused(UsageError, "--vae"):
        convert_from(source, tmp_path / "b", name)
    assert run_cli("store", "convert", source, tmp_path / "b", "--from", name, "--vae", tiny_vae_folder) == 0
    manifest = read_manifest(tmp_path / "b")
    assert manifest.recorded.claimed and manifest.identity.preprocessing == "unknown" and verify(tmp_path / "b") == []
    data = LatentDataset(tmp_path / "b", raw=True)
    assert torch.equal(torch.stack([item["sample"] for item in data]), latents)
    assert data[0]["bucket"] == "16x12" and data[0]["image_sha256"] is None
    pixels = LatentDataset(tmp_path / "b")
    assert pixels.decode(pixels[0]["latents"], load_autoencoder(tiny_vae_folder)).shape == (3, 16, 12)


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_latents_of_another_channel_count_are_not_of_this_vae(
    name: str, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    source = strangers(tmp_path / "theirs", name, torch.randn(2, 16, 8, 6))
    with refused(UsageError, "--vae") as error:
        convert_from(source, tmp_path / "b", name, vae=tiny_vae)
    assert "16 channels" in str(error.value) and "VAE 4;" in str(error.value)
    assert not (tmp_path / "b").exists()


def without_identity(store: Path, out: Path, name: str) -> Path:
    """A store of ours in that format, as if another program had written it: what says which VAE made it is gone."""
    convert_to(store, out, name, KOHYA if name == "kohya" else None)
    (out / "store.json").unlink(missing_ok=True)
    for file in out.rglob("*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    for file in out.rglob("*.npz"):
        with np.load(file) as arrays:
            kept = {key: value for key, value in arrays.items() if not key.startswith("ldm_vae")}
        np.savez(file, **kept)
    return out


@pytest.mark.parametrize(
    "name", [name for name in IMAGE_FORMATS if name != "lightningdit"]
)  # whose shards tell no size
def test_latents_of_another_f_are_not_of_this_vae(name: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS | {"bucket_step": 4}, store="sample")
    source = without_identity(tmp_path / "s", tmp_path / "out", name)
    manifest, _ = convert_from(source, tmp_path / "b", name, vae=tiny_vae)  # f = 2, whatever the shape of the buckets
    assert manifest.samples == 3 and manifest.recorded.claimed
    other = AutoencoderConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4).build()
    with refused(UsageError, "--vae"):
        convert_from(source, tmp_path / "c", name, vae=other)
    assert not (tmp_path / "c").exists()


def test_a_claim_is_not_encoded_again_and_not_merged_blindly(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    source = strangers(tmp_path / "theirs", "kohya", torch.randn(5, 4, 8, 8))
    for out in "ab":
        convert_from(source, tmp_path / out, "kohya", vae=tiny_vae, shard_size=2)
    with refused(UsageError, "checksum"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    (tmp_path / "a" / "shards" / "00000001.safetensors").unlink()
    with refused(WorkError, str(tmp_path / "a")):
        repair(tmp_path / "a", vae=lambda: tiny_vae, source=lambda: Pictures(5))
    with refused(UsageError, "preprocessing"):
        write_store(tiny_vae, Pictures(5), tmp_path / "b", **SETTINGS, store="sample", dtype="fp32", update=True)


def test_another_vae_than_the_one_that_is_named_is_refused(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS)
    convert_to(tmp_path / "s", tmp_path / "out", "webdataset")
    assert convert_from(tmp_path / "out", tmp_path / "b", "webdataset", vae=tiny_vae)[0].samples == 3
    tiny_vae.encoder.conv_in.weight.data += 1
    with refused(UsageError, "--vae"):
        convert_from(tmp_path / "out", tmp_path / "c", "webdataset", vae=tiny_vae)


def test_as_a_user_calls_it(tiny_vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tiny_vae, Pictures(8), tmp_path / "s", **SETTINGS)
    assert run_cli("store", "convert", tmp_path / "s", tmp_path / "k", "--to", "kohya", "--model", "sd") == 0
    said = capsys.readouterr().out
    assert "what it does not carry:\n  logvar" in said and "sd-scripts 0.10.2" in said and "--names sized" in said
    call = ("store", "convert", tmp_path / "s", tmp_path / "p", "--to", "kohya", "--model", "sd", "--names", "old")
    assert run_cli(*call) == 0
    assert "sd-scripts 0.7.0" in capsys.readouterr().out and list((tmp_path / "p").rglob("img_001.npz"))
    for flag in (("--model", "sd"), ("--names", "old")):  # a cache's alone
        assert run_cli("store", "convert", tmp_path / "s", tmp_path / "x", "--to", "parquet", *flag) == 2
        assert flag[0] in capsys.readouterr().err
    assert run_cli("store", "convert", tmp_path / "k", tmp_path / "b", "--from", "kohya") == 0
    assert "8 samples in 1 shards" in capsys.readouterr().out
    assert run_cli("store", "convert", tmp_path / "s", tmp_path / "x") == 2
    assert sorted(get_args(Format)) == names() and {*FOR_A_MODEL} < {*names()}
    assert get_args(Model) == tuple(dict.fromkeys([*kohya.MODELS, *musubi.MODELS, *finetrainers.MODELS]))
    assert get_args(Names) == kohya.NAMES
