"""Stores of clips in other programs' formats: what their trainers read is what was said, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import safe_open
from safetensors.torch import save_file
from sentences import refused
from store_sources import Footage, Pictures, ordered_clips
from stores import shard_files
from tiny_classes import tiny

from ldm_vae import LatentDataset, read_manifest, write_store
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import verify
from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
from ldm_vae.latent_store.convert.formats import Options, finetrainers
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.maintain.merge_split import take_where
from ldm_vae.latent_store.write import sample_stream

SETTINGS: dict[str, Any] = {"resolution": 16, "batch_size": 2, "shard_size": 6, "dtype": "fp32"}
WAN = "AutoencoderKLWan"


@pytest.fixture(autouse=True)
def _clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stream, "ordered_loader", ordered_clips)


class Windowed(Footage):
    """Two clips of each video."""

    def key(self, index: int) -> str:
        return f"films/film_{index // 2}.mp4#t={index % 2 * 5 / 25:g}"


def unordered(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"source": manifest.source.model_copy(update={"keys": ""})})


@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_every_tensor_and_length_comes_back(name: str, tmp_path: Path) -> None:
    for case, more in {"views": {"views": "flip", "pixels": True}, "bf16": {"dtype": "bf16", "bucket_step": 8}}.items():
        store, out = tmp_path / case, tmp_path / f"{case}-out"
        write_store(tiny(WAN), Footage(count=9, bad=(8,)), store, **SETTINGS | more)
        convert_to(store, out, name)
        convert_to(store, tmp_path / f"{case}-again", name)
        assert tree(out) == tree(tmp_path / f"{case}-again")
        back, _ = convert_from(out, tmp_path / f"{case}-back", name)
        assert shard_files(tmp_path / f"{case}-back") == shard_files(store)
        # of a unit with several lengths the order of its samples is gone, as of one with several buckets
        assert unordered(back) == unordered(read_manifest(store))
        assert {shard.frames for shard in back.shards} == {1, 5, 9}


def test_datasets_loads_the_parquet_of_clips(tmp_path: Path) -> None:
    source = Footage(count=3)
    source.frames = (5,)
    write_store(tiny(WAN), source, tmp_path / "s", **SETTINGS)
    convert_to(tmp_path / "s", tmp_path / "out", "parquet")
    files = str(tmp_path / "out" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["mean"], datasets.Array4D) and loaded["clip_frames"][:] == [5] * 3
    assert torch.equal(loaded.with_format("torch")[2]["mean"], LatentDataset(tmp_path / "s", raw=True)[2]["mean"])


# --- musubi-tuner -----------------------------------------------------------------------------------------------------


def musubi_reads(folder: Path, architecture: str, *, of_clips: bool) -> dict[str, list[torch.Tensor]]:
    """The latents of each item, found and named as musubi-tuner does it.

    Written after dataset/image_video_dataset.py (`prepare_for_training`) and dataset/bucket.py (`__getitem__`).
    """
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.glob(f"*_{architecture}.safetensors")):
        tokens = path.name.split("_")
        width, height = map(int, tokens[-2].split("x"))
        assert min(width, height) > 0
        frames = int(tokens[-3].split("-")[:2][1]) if of_clips else 1
        with safe_open(path, "pt") as opened:
            (key,) = opened.keys()
            content = key.removesuffix("_float32").rsplit("_", 1)[0]
            z = opened.get_tensor(key)
        assert content == "latents" and z.shape[1] == 1 + (frames - 1) // 4
        found.setdefault("_".join(tokens[: -3 if of_clips else -2]), []).append(z)
    return found


@pytest.mark.parametrize(("model", "scaled"), [("wan", True), ("hv", False)])
def test_musubi_tuner_finds_what_it_reads(model: str, scaled: bool, tmp_path: Path) -> None:
    source = Windowed(count=8)
    source.frames = (5, 5, 9, 9)
    write_store(tiny(WAN), source, tmp_path / "s", **SETTINGS, store="mean")
    lost = " ".join(convert_to(tmp_path / "s", tmp_path / "out", "musubi", Options(model=model)))
    assert ("are normalised" in lost) == scaled == ("multiplies" not in lost)
    convert_to(tmp_path / "s", tmp_path / "again", "musubi", Options(model=model))
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    read = musubi_reads(tmp_path / "out" / "clips", model, of_clips=True)
    data = LatentDataset(tmp_path / "s", sample=False) if scaled else LatentDataset(tmp_path / "s", raw=True)
    field = "latents" if scaled else "mean"
    expected: dict[str, list[torch.Tensor]] = {}
    for item in data:
        expected.setdefault(item["key"].partition("#")[0][6:-4], []).append(item[field])
    assert read.keys() == expected.keys() == {f"film_{number}" for number in range(4)}
    assert all(torch.equal(*pair) for name in read for pair in zip(read[name], expected[name], strict=True))
    with safe_open(tmp_path / "out" / "clips" / f"film_1_00001-009_0020x0024_{model}.safetensors", "pt") as opened:
        assert list(opened.keys()) == ["latents_3x2x2_float32"]
        said = opened.metadata()
    row = json.loads(said.pop("ldm_vae"))
    assert said == {
        "format": "pt", "architecture": {"wan": "wan", "hv": "hunyuan_video"}[model], "width": "20", "height": "24",
        "format_version": "1.0.1", "frame_count": "9",
    }  # fmt: skip
    assert row["row"]["key"] == "films/film_1.mp4#t=0.2" and row["order"] == 5


def test_of_moments_there_is_a_place_for_the_mean_or_a_sample(tmp_path: Path) -> None:
    write_store(tiny(WAN), Footage(count=4), tmp_path / "s", **SETTINGS, views="flip", pixels=True)
    data = LatentDataset(tmp_path / "s", raw=True)
    for model, kind in (("wan", "mean"), ("hv", "sample")):
        lost = " ".join(convert_to(tmp_path / "s", tmp_path / model, "musubi", Options(model=model)))
        for phrase in ("logvar", "the views flip", "the stored pixels", "captions", "the VAE"):
            assert phrase in lost, (model, phrase)
        back, _ = convert_from(tmp_path / model, tmp_path / f"{model}-back", "musubi")
        assert (back.identity.store, back.identity.views, back.samples) == (kind, ("",), 4)
        again = LatentDataset(tmp_path / f"{model}-back", raw=True)
        apart = max(float((again[n][kind] - data[n]["mean"]).abs().max()) for n in range(4))
        assert apart < 1e-5 if kind == "mean" else 0.1 < apart < 10
    # clips of one frame are images
    images = musubi_reads(tmp_path / "wan" / "images", "wan", of_clips=False)
    assert [*images] == ["img_003"] and len([*(tmp_path / "wan" / "clips").iterdir()]) == 3


def test_what_musubi_tuner_has_of_a_store_is_that_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for store, more in {"clips": {"store": "mean", "dtype": "bf16"}, "samples": {"store": "sample"}}.items():
        write_store(tiny(WAN), Footage(count=8, bad=(7,)), tmp_path / store, **SETTINGS | more)
        convert_to(tmp_path / store, tmp_path / f"{store}-out", "musubi", Options(model="hv"))
        (tmp_path / f"{store}-out" / "clips" / "film_hv_te.safetensors").write_bytes(
            (tmp_path / f"{store}-out" / "clips" / "img_000_00000-005_0020x0024_hv.safetensors").read_bytes()
        )
        save_file({"llm_float32": torch.ones(1)}, tmp_path / f"{store}-out" / "clips" / "film_hv_te.safetensors")
        back, notes = convert_from(tmp_path / f"{store}-out", tmp_path / f"{store}-back", "musubi")
        assert notes == ("1 .safetensors without latents were left out",)
        assert shard_files(tmp_path / f"{store}-back") == shard_files(tmp_path / store)
        assert unordered(back) == unordered(read_manifest(tmp_path / store))
    monkeypatch.undo()
    write_store(tiny(WAN), Pictures(5), tmp_path / "stills", **SETTINGS, store="mean")  # latents [c, h, w]
    convert_to(tmp_path / "stills", tmp_path / "stills-out", "musubi", Options(model="hv"))
    convert_from(tmp_path / "stills-out", tmp_path / "stills-back", "musubi")
    assert shard_files(tmp_path / "stills-back") == shard_files(tmp_path / "stills")


def test_musubi_tuners_own_cache_is_read_with_the_vae_that_made_it(tmp_path: Path) -> None:
    vae, theirs = tiny(WAN), tmp_path / "theirs"
    vae.save_pretrained(tmp_path / "vae")
    theirs.mkdir()
    latents = torch.randn(2, 16, 3, 2, 4).bfloat16()
    for number, z in enumerate(latents):
        save_file(
            {"latents_3x2x4_bfloat16": z, "clip_bfloat16": torch.ones(2)},
            theirs / f"a_film_0000{number}-009_0640x0360_wan.safetensors",
            {"architecture": "wan", "width": "640", "height": "360", "format_version": "1.0.1", "frame_count": "9"},
        )
    with refused(UsageError, "--vae"):
        convert_from(theirs, tmp_path / "b", "musubi")
    assert run_cli("store", "convert", theirs, tmp_path / "b", "--from", "musubi", "--vae", tmp_path / "vae") == 0
    manifest = read_manifest(tmp_path / "b")
    assert manifest.recorded.claimed and verify(tmp_path / "b") == [] and manifest.shards[0].frames == 9
    data = LatentDataset(tmp_path / "b")
    for number in range(2):
        torch.testing.assert_close(data[number]["latents"], latents[number].float(), rtol=1e-5, atol=1e-5)
    assert (data[1]["key"], data[1]["bucket"], data[1]["original_size"]) == (
        "a_film_00001-009_0640x0360_wan", "16x32", [360, 640],
    )  # fmt: skip
    assert data.decode(data[0]["latents"], vae).shape == (3, 9, 16, 32)
    with refused(UsageError, "t"):  # no clip of CogVideoX has four latent frames
        _cache(tmp_path / "other", torch.randn(4, 4, 2, 2))
        convert_from(tmp_path / "other", tmp_path / "c", "musubi", vae=tiny("AutoencoderKLCogVideoX"))
    with refused(UsageError, "--vae"):
        convert_from(theirs, tmp_path / "c", "musubi", vae=tiny("AutoencoderKLHunyuanVideo"))


def _cache(folder: Path, z: torch.Tensor, architecture: str = "hunyuan_video", count: int = 1) -> Path:
    """A folder with the cache of one clip; `count` tensors in it."""
    folder.mkdir()
    name = "x".join(map(str, z.shape[1:]))
    tensors = {f"latents_{name}_{kind}": z.clone() for kind in ("float32", "float16")[:count]}
    save_file(tensors, folder / "a_00000-009_0064x0064_hv.safetensors", {"architecture": architecture})
    return folder


def test_a_cache_that_is_no_cache_is_one_sentence(tmp_path: Path) -> None:
    vae = tiny(WAN)
    for case, (z, name, count) in {
        "flat": (torch.randn(16, 2, 2), "wan", 1), "unknown": (torch.randn(16, 3, 2, 2), "flux_2_dev", 1),
        "two": (torch.randn(16, 3, 2, 2), "wan", 2),
    }.items():  # fmt: skip
        _cache(tmp_path / case, z, name, count)
        if case == "flat":  # the name says what the tensor is not
            path = tmp_path / case / "a_00000-009_0064x0064_hv.safetensors"
            save_file({"latents_1x2x2_float32": z}, path, {"architecture": "wan"})
        with refused(WorkError, str(tmp_path / case)):
            convert_from(tmp_path / case, tmp_path / "b", "musubi", vae=vae)
    with refused(UsageError, "SRC"):
        convert_from(tmp_path / "two" / "a_00000-009_0064x0064_hv.safetensors", tmp_path / "b", "musubi", vae=vae)
    assert not (tmp_path / "b").exists()


def test_base_names_that_musubi_tuner_would_mix_up_are_refused(tmp_path: Path) -> None:
    class Twins(Footage):
        def key(self, index: int) -> str:
            return f"{'ab'[index]}/film.mp4"

    class Climbing(Footage):
        def key(self, index: int) -> str:
            return "films/..#t=0"

    source = Twins(count=2)
    source.frames = (5,)
    write_store(tiny(WAN), source, tmp_path / "twins", **SETTINGS)
    with refused(WorkError, "b/film.mp4"):
        convert_to(tmp_path / "twins", tmp_path / "x", "musubi", Options(model="wan"))
    write_store(tiny(WAN), Climbing(count=1), tmp_path / "climbing", **SETTINGS)
    convert_to(tmp_path / "climbing", tmp_path / "dots", "musubi", Options(model="wan"))
    assert [path.name for path in (tmp_path / "dots" / "clips").iterdir()] == [".._00000-005_0020x0024_wan.safetensors"]
    write_store(tiny(WAN), source, tmp_path / "sizes", **SETTINGS | {"resolution": (16, 32)})
    with refused(UsageError, "--to"):
        convert_to(tmp_path / "sizes", tmp_path / "x", "musubi", Options(model="wan"))
    take_where(tmp_path / "sizes", tmp_path / "one", [("resolution", "32"), ("key", "a/film.mp4")])
    convert_to(tmp_path / "one", tmp_path / "large", "musubi", Options(model="wan"))
    assert not (tmp_path / "x").exists()


# --- finetrainers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", finetrainers.MODELS)
def test_finetrainers_finds_what_it_reads(model: str, tmp_path: Path) -> None:
    vae = tiny(WAN)
    write_store(vae, Footage(count=4), tmp_path / "s", **SETTINGS, views="flip", pixels=True)
    lost = " ".join(convert_to(tmp_path / "s", tmp_path / "out", "finetrainers", Options(model=model)))
    for phrase in ("the views flip", "the stored pixels", "captions", "the VAE"):
        assert phrase in lost
    assert ("multiplies" in lost) == (model in ("hunyuan_video", "cogvideox"))
    folder, data = tmp_path / "out" / "finetrainers-precomputed-data", LatentDataset(tmp_path / "s", raw=True)
    assert sorted(path.name for path in folder.iterdir()) == [f"latent-{number}.pt" for number in range(4)]
    lengths = set()
    for number in range(4):
        item = torch.load(folder / f"latent-{number}.pt", weights_only=True)
        latents, axis = item.pop("latents"), 2 if model == "cogvideox" else 1
        assert latents.dtype == torch.float32
        mean, logvar = latents.transpose(1, axis)[0].chunk(2)
        assert torch.equal(mean, data[number]["mean"]) and torch.equal(logvar, data[number]["logvar"])
        if model == "ltx_video":
            assert [item.pop(name) for name in ("num_frames", "height", "width")] == [*mean.shape[1:]]
        if model in ("wan", "ltx_video"):
            assert torch.equal(item.pop("latents_mean"), torch.tensor(vae.config.latents_mean))
            std = item.pop("latents_std")
            torch.testing.assert_close(1 / std if model == "wan" else std, torch.tensor(vae.config.latents_std))
        assert item == {}
        lengths.add(mean.shape[1])
    assert lengths == {1, 2, 3}


def test_a_store_without_posteriors_gives_finetrainers_no_noise(tmp_path: Path) -> None:
    write_store(tiny(WAN), Footage(count=3), tmp_path / "s", **SETTINGS | {"dtype": "bf16"}, store="mean")
    lost = " ".join(convert_to(tmp_path / "s", tmp_path / "out", "finetrainers", Options(model="hunyuan_video")))
    assert "logvar is -30" in lost
    folder = tmp_path / "out" / "finetrainers-precomputed-data"
    latents = torch.load(folder / "latent-2.pt", weights_only=True)["latents"]
    assert latents.dtype == torch.bfloat16 and latents.shape == (1, 32, 3, 2, 2)
    mean = LatentDataset(tmp_path / "s", raw=True)[2]["mean"]
    torch.testing.assert_close(
        DiagonalGaussianDistribution(latents.float()).sample()[0], mean.float(), atol=1e-5, rtol=0
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    write_store(tiny(WAN), Footage(count=3), tmp_path / "s", **SETTINGS)
    for name in ("kohya", "lightningdit"):
        with refused(UsageError, "--to"):
            convert_to(tmp_path / "s", tmp_path / "x", name, Options(model="sd"))
    for name in ("musubi", "finetrainers"):
        with refused(UsageError, "--model"):
            convert_to(tmp_path / "s", tmp_path / "x", name, Options(model="sd"))
    with refused(UsageError, "--model"):
        convert_to(tmp_path / "s", tmp_path / "x", "musubi", Options(model="hv15"))
    with refused(UsageError, "--from"):
        convert_from(tmp_path / "s", tmp_path / "x", "finetrainers")
    vae = tiny("AutoencoderKLKVAEVideo", z_channels=16)  # no pipeline names its normalisation
    write_store(vae, Footage(count=3), tmp_path / "raw", **SETTINGS)
    for name in ("musubi", "finetrainers"):
        with refused(UsageError, "normalisation"):
            convert_to(tmp_path / "raw", tmp_path / "x", name, Options(model="wan"))
    assert not (tmp_path / "x").exists()
