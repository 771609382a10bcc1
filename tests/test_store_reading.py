"""LatentDataset: the right rows, scaled by the right formula, noise by key, safe in workers."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from fork_server import forkserver
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS
from torch.utils.data import DataLoader

from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import LatentDataset, read_manifest, write_store


@pytest.fixture
def store(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """21 pictures in three shards, index 9 missing."""
    write_store(tiny_vae, Pictures(bad=(9,)), tmp_path / "store", **SETTINGS, vae_name="tiny")
    return tmp_path / "store"


def test_latents_are_the_sampled_moments_normalised(store: Path) -> None:
    raw = LatentDataset(store, raw=True)
    normalisation = Normalisation(0.7, 0.3)
    data = LatentDataset(store, seed=5, normalisation=normalisation)
    data.set_epoch(2)
    for index in (0, 8, 19):
        noise = rng.normal(5, "latent store", [(2, index)], (4, 8, 8))[0]
        z = raw[index]["mean"] + torch.exp(0.5 * raw[index]["logvar"]) * noise
        torch.testing.assert_close(data[index]["latents"], (z - 0.3) * 0.7)
        assert int(data[index]["index"]) == index
    mean = LatentDataset(store, sample=False, normalisation=normalisation)
    torch.testing.assert_close(mean[8]["latents"], (raw[8]["mean"] - 0.3) * 0.7)


def test_noise_is_new_each_epoch_and_does_not_depend_on_company(store: Path) -> None:
    data = LatentDataset(store)
    alone = data[7]["latents"]
    assert torch.equal(alone, LatentDataset(store).__getitems__([3, 7, 19])[1]["latents"])
    assert torch.equal(alone, LatentDataset(store)[7]["latents"])
    data.set_epoch(1)
    assert not torch.equal(alone, data[7]["latents"])
    assert not torch.equal(alone, LatentDataset(store, seed=1)[7]["latents"])


def test_the_normalisation_is_the_vaes_unless_another_is_asked_for(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    tiny_vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    write_store(tiny_vae, Pictures(6), tmp_path / "s", **SETTINGS)
    assert LatentDataset(tmp_path / "s").normalisation == Normalisation(0.5, 0.25)
    measured = LatentDataset(tmp_path / "s", normalisation="channel")
    values = torch.stack([measured[i]["latents"] for i in range(6)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(4), atol=0.25, rtol=0.0)
    torch.testing.assert_close(values.std(dim=1), torch.ones(4), atol=0.15, rtol=0.0)


def test_decode_undoes_the_scaling(store: Path, tiny_vae: AutoencoderKL) -> None:
    data = LatentDataset(store, sample=False, normalisation=Normalisation(3.0, -1.0))
    raw = LatentDataset(store, raw=True)
    with torch.no_grad():
        expected = tiny_vae.decode(torch.stack([raw[i]["mean"] for i in range(3)])).sample
    got = data.decode(torch.stack([data[i]["latents"] for i in range(3)]), tiny_vae)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(data.decode(data[1]["latents"], tiny_vae), expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_give_what_the_process_itself_gives(store: Path, context: str) -> None:
    """A worker of the server is given the dataset pickled, as a spawned one is."""
    if context == "forkserver":
        forkserver()  # whose server has imported
    data = LatentDataset(store, columns=("caption",))
    data[0]  # mapped before the workers start
    loader: Any = DataLoader(data, batch_size=6, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert [len(batch["caption"]) for batch in batches] == [6, 6, 6, 2]
    latents = torch.cat([batch["latents"] for batch in batches])
    here = LatentDataset(store)  # `data` would give the second draws
    here[0]
    assert torch.equal(latents, torch.stack([here[i]["latents"] for i in range(20)]))
    assert [caption for batch in batches for caption in batch["caption"]] == [data[i]["caption"] for i in range(20)]


def test_pickling_sends_no_maps(store: Path) -> None:
    data = LatentDataset(store)
    before = len(pickle.dumps(data))
    assert before < 20_000
    for index in range(20):
        data[index]
    assert len(pickle.dumps(data)) == before
    assert torch.equal(pickle.loads(pickle.dumps(data))[3]["latents"], data[3]["latents"])


def test_columns_are_chosen_and_a_wrong_one_is_named(store: Path) -> None:
    assert set(LatentDataset(store, columns=("label",))[0]) == {"latents", "index", "label"}
    assert set(LatentDataset(store, columns=())[0]) == {"latents", "index"}
    with refused(UsageError, "columns") as error:
        LatentDataset(store, columns=("captoin",))
    assert "no 'captoin'; it has 'key', 'source'" in str(error.value)


def test_it_reads_without_the_derived_rows(store: Path) -> None:
    expected = LatentDataset(store)[13]
    for path in (store / "shards").glob("*.arrow"):
        path.unlink()
    item = LatentDataset(store)[13]
    assert {k: v for k, v in item.items() if k not in ("latents", "index")} == {
        k: v for k, v in expected.items() if k not in ("latents", "index")
    }


def test_negative_and_out_of_range_indices(store: Path) -> None:
    data = LatentDataset(store)
    assert torch.equal(data[-1]["latents"], LatentDataset(store)[19]["latents"])
    with pytest.raises(IndexError, match="index 20 of a store of 20"):
        data[20]
    assert len(list(data)) == 20  # ends by IndexError


def test_no_store_a_newer_one_and_a_damaged_one(store: Path, tmp_path: Path) -> None:
    with refused(UsageError, "manifest.json"):
        LatentDataset(tmp_path / "nowhere")
    manifest = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(manifest.replace('"version": 1', '"version": 2'))
    with refused(UsageError, "format version") as error:
        LatentDataset(store)
    assert "version 2" in str(error.value) and "version 1" in str(error.value)
    (store / "manifest.json").write_text(manifest[: len(manifest) // 2])
    with pytest.raises(WorkError, match=r"manifest\.json"):  # and json's words, so not golden
        LatentDataset(store)
    (store / "manifest.json").write_text(manifest.replace('"00000001"', '"../../etc/passwd"'))
    with pytest.raises(WorkError, match=r"`shards\.1\.name`"):  # and pydantic's words, so not golden
        LatentDataset(store)


def test_a_truncated_shard_and_a_link_out_of_the_store_are_clear_errors(store: Path, tmp_path: Path) -> None:
    shard = store / "shards" / "00000001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with refused(WorkError, "00000001.safetensors"):
        LatentDataset(store)[8]
    LatentDataset(store)[0]
    shard.unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    os.symlink(tmp_path / "elsewhere", shard)
    with refused(WorkError, "00000001.safetensors"):
        LatentDataset(store)[8]
    assert read_manifest(store).samples == 20
