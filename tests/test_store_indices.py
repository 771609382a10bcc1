"""A VQModel's store: indices of codes, written like any other, decoded to the same picture as the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderTiny, VQModel
from safetensors.torch import load_file
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS
from tiny_networks import vq_model

from ldm_vae.autoencoder import latents
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.maintain.rounding_error import measure_costs
from ldm_vae.latent_store.maintain.spot_check import reencode
from ldm_vae.latent_store.maintain.summary import describe
from ldm_vae.latent_store.write.processes import Processes


@pytest.fixture(scope="module")
def vae() -> VQModel:
    return vq_model()


def test_what_is_stored_is_what_the_quantizer_gives(vae: VQModel, tmp_path: Path) -> None:
    source = Pictures(7, size=(16, 16))
    manifest = write_store(vae, source, tmp_path / "s", **SETTINGS, views="flip")
    assert (manifest.identity.store, manifest.identity.dtype, manifest.identity.codes) == ("indices", "uint16", 32)
    dataset = LatentDataset(tmp_path / "s")
    found = dataset[3]["indices"]
    assert found.dtype == torch.int64
    image = to_pixels(torch.from_numpy(source.pixels(3)).permute(2, 0, 1).contiguous())[None]
    vectors = latents.encode(vae, image).mean
    distances = (vectors[0].flatten(1).T[:, None] - vae.quantize.embedding.weight[None]).square().sum(-1)
    assert torch.equal(found, distances.argmin(1).view(found.shape))
    assert len(found.unique()) > 1
    # decoded by look-up as the model itself decodes its vectors
    torch.testing.assert_close(dataset.decode(found, vae), vae.decode(vectors).sample[0], atol=1e-5, rtol=0)
    mirrored = LatentDataset(tmp_path / "s", view="flip")[3]["indices"]
    assert torch.equal(mirrored, latents.nearest_codes(vae, latents.encode(vae, image.flip(3)).mean)[0])


def test_batches_raw_tensors_and_other_readers(vae: VQModel, tmp_path: Path) -> None:
    write_store(vae, Pictures(9), tmp_path / "s", **SETTINGS)
    batch = next(iter(LatentDataset(tmp_path / "s").loader(4, shuffle=False)))
    assert batch["indices"].shape == (4, *LatentDataset(tmp_path / "s").shape(0))
    stored = LatentDataset(tmp_path / "s", raw="indices")[2]["indices"]
    assert stored.dtype == torch.uint16
    first = read_manifest(tmp_path / "s").shards[0].name
    theirs = load_file(tmp_path / "s" / "shards" / f"{first}.safetensors")["indices"]
    assert torch.equal(theirs[2], stored)


def test_any_number_of_processes_give_the_same_bytes(vae: VQModel, tmp_path: Path) -> None:
    write_store(vae, Pictures(), tmp_path / "one", **SETTINGS)
    with refused(WorkError, "unit") as error:  # the other process has not come yet
        write_store(vae, Pictures(), tmp_path / "two", **SETTINGS, processes=Processes(0, 2))
    assert "unit 1" in str(error.value)
    write_store(vae, Pictures(), tmp_path / "two", **SETTINGS)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_usage_of_codes_is_counted_over_what_is_there(vae: VQModel, tmp_path: Path) -> None:
    write_store(vae, Pictures(20), tmp_path / "s", **SETTINGS)
    manifest = write_store(vae, Pictures(12), tmp_path / "s", **SETTINGS, update=True)
    dataset = LatentDataset(tmp_path / "s")
    assert len(dataset) == 12
    counts = np.bincount(torch.stack([item["indices"] for item in dataset]).flatten().numpy(), minlength=32)
    shares = counts[counts > 0] / counts.sum()
    assert manifest.statistics is not None
    assert manifest.statistics["used"] == int((counts > 0).sum())
    assert manifest.statistics["count"] == counts.sum()
    assert manifest.statistics["perplexity"] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))
    assert f"{manifest.statistics['used']} of 32 used" in describe(tmp_path / "s", manifest)


def test_it_is_verified_encoded_again_and_its_cost_is_told(vae: VQModel, tmp_path: Path) -> None:
    source = Pictures(9)
    manifest = write_store(vae, source, tmp_path / "s", **SETTINGS)
    assert verify(tmp_path / "s") == []
    same = reencode(tmp_path / "s", manifest, vae, source, 5)
    assert (same.samples, same.identical, same.problems) == (5, 5, ())
    costs = measure_costs(tmp_path / "s", manifest, vae, source)
    assert costs.worst == 0
    assert costs.stored == costs.exact
    moved = vq_model()
    moved.quantize.embedding.weight.data = moved.quantize.embedding.weight.data.flip(0)
    with refused(UsageError, "encoder"):  # the codebook is part of what indices mean
        write_store(moved, source, tmp_path / "s", **SETTINGS)


def test_the_integer_holds_every_index(tmp_path: Path) -> None:
    many = vq_model(codes=(1 << 16) + 2)
    many.quantize.embedding.weight.data[: 1 << 16] += 1e3  # only the last two are near
    manifest = write_store(many, Pictures(3), tmp_path / "s", **SETTINGS)
    assert manifest.identity.dtype == "int32"
    assert int(LatentDataset(tmp_path / "s")[0]["indices"].min()) >= 1 << 16


def test_nan_is_quarantined_though_an_index_is_always_finite(tmp_path: Path) -> None:
    broken = vq_model()
    broken.encoder.conv_in.weight.data.fill_(float("nan"))
    with refused(WorkError, "img_000.png"):
        write_store(broken, Pictures(3), tmp_path / "s", **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"store": "moments"}, "store"),
        ({"dtype": "fp16"}, "dtype"),
        ({"store": "mean", "dtype": "uint16"}, "dtype"),
    ],
)
def test_what_a_vae_cannot_give_is_said(vae: VQModel, tmp_path: Path, settings: Any, field: str) -> None:
    with refused(UsageError, field):
        write_store(vae, Pictures(3), tmp_path / "s", **SETTINGS, **settings)
    assert not (tmp_path / "s").exists()


def test_indices_have_no_normalisation(vae: VQModel, tmp_path: Path) -> None:
    write_store(vae, Pictures(3), tmp_path / "s", **SETTINGS)
    with refused(UsageError, "normalisation"):
        LatentDataset(tmp_path / "s", normalisation="scale")
    with refused(UsageError, "indices"):
        _ = LatentDataset(tmp_path / "s").statistics


def test_an_autoencoder_without_a_variance_stores_its_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4).eval()
    manifest = write_store(tiny, Pictures(3), tmp_path / "s", **SETTINGS)
    assert manifest.identity.store == "mean"
    assert LatentDataset(tmp_path / "s")[0]["latents"].shape[0] == 4


def test_commands(vae: VQModel, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae.save_pretrained(tmp_path / "vae")
    store, out = str(tmp_path / "store"), tmp_path / "pictures"
    assert (
        run_cli("encode", str(tmp_path / "vae"), str(image_folder), store, "--resolution", "16", "--num_workers", "0")
        == 0
    )
    said = capsys.readouterr().out
    assert "indices in uint16" in said
    assert "perplexity" in said
    assert run_cli("store", "stats", store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["statistics"]["codes"] == 32
    assert run_cli("store", "verify", store, "--reencode", "3") == 0
    assert "3 to the same bits" in capsys.readouterr().out
    assert run_cli("decode", store, str(out)) == 0
    assert len(list(out.glob("*.png"))) > 0
