"""A latent store of sounds: rows [c, n] of excerpts, and every promise of that of images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from checksums import tree
from cli_call import call
from PIL import Image
from sentences import refused
from sound_files import RATE, encoded, tone, write_sounds
from tiny_classes import SOUNDS, tiny

from ldm_vae import LatentDataset, read_manifest, write_store
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import own_rate, preparation_of
from ldm_vae.core.errors import UsageError
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.source import Source
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.store_card import store_card
from ldm_vae.latent_store.convert.conversion import convert_to
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.maintain.merge_split import merge, split
from ldm_vae.latent_store.maintain.repair import repair
from ldm_vae.latent_store.maintain.spot_check import reencode
from ldm_vae.latent_store.maintain.summary import describe
from ldm_vae.latent_store.maintain.verify import verify
from ldm_vae.latent_store.read.pictures import contact_sheet

SETTINGS: dict[str, Any] = {"resolution": 512, "batch_size": 2, "shard_size": 5, "dtype": "fp32"}
OOBLECK = "AutoencoderOobleck"


def opened(vae: Any, folder: Path, samples: int = 512) -> Source:
    return preparation_of({"": vae}, DataFlags(samples=samples, sample_rate=own_rate(vae))).open(folder)


@pytest.mark.parametrize("name", SOUNDS)
def test_what_is_stored_is_what_the_encoder_gives(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    vae.register_to_config(**{key: RATE for key in ("sampling_rate", "sample_rate") if key in vae.config})
    folder = write_sounds(tmp_path / "sounds", 3, samples=1200, channels=geometry_of(vae).in_channels)
    source = opened(vae, folder)
    manifest = write_store(vae, source, tmp_path / "store", **SETTINGS)
    assert manifest.samples == len(source) == 9 and verify(tmp_path / "store") == []
    own, raw = own_normalisation(vae), LatentDataset(tmp_path / "store", raw=True)
    data = LatentDataset(tmp_path / "store", sample=False, normalisation="scale" if own is None else None)
    statistics = LatentStatistics()
    for index in range(9):
        stored, wave = raw[index], tone(1200, geometry_of(vae).in_channels, frequency=220.0 * (index // 3 + 1))
        part = np.zeros((512, wave.shape[1]), np.float32)
        held = min(512, 1200 - index % 3 * 512)
        part[:held] = wave[index % 3 * 512 :][:held]
        with torch.no_grad():
            found = latents.encode(vae, torch.from_numpy(part.T)[None])
            decoded = latents.decode(vae, found.mean)[0]
        torch.testing.assert_close(stored["mean"], found.mean[0], rtol=1e-4, atol=1e-4)
        if not found.is_point:
            torch.testing.assert_close(stored["logvar"], found.logvar[0], rtol=1e-4, atol=1e-4)
        assert stored["crop_box"] == [0, index % 3 * 512, 1, held] and stored["original_size"] == [1, 1200]
        statistics.update(found)
        mean = data[index]["latents"]
        assert mean.shape == data.shape(index) == (geometry_of(vae).latent_channels, 512 // geometry_of(vae).factor)
        if own is not None:
            assert torch.equal(mean, own.apply(stored["mean"][None])[0])
        torch.testing.assert_close(data.decode(mean, vae), decoded, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(data.decode(mean[None], vae)[0], decoded, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.statistics.mean, statistics.mean, rtol=1e-5, atol=1e-5)
    batch = next(iter(data.loader(4)))
    assert batch["latents"].shape == (4, *data.shape(0))
    channel = LatentDataset(tmp_path / "store", sample=False, normalisation="channel")
    whitened = torch.stack([channel[index]["latents"] for index in range(9)])
    torch.testing.assert_close(whitened.mean(dim=(0, 2)), torch.zeros(whitened.shape[1]), rtol=0, atol=1e-3)


def test_stable_audio_sees_z_as_it_is(tmp_path: Path) -> None:
    vae = tiny(OOBLECK, audio_channels=1)
    write_store(vae, opened(vae, write_sounds(tmp_path / "sounds")), tmp_path / "store", **SETTINGS)
    raw, data = (LatentDataset(tmp_path / "store", raw=one, sample=False) for one in (True, False))
    assert torch.equal(raw[0]["mean"], data[0]["latents"])
    # as pipeline_stable_audio.py does with a sound: `vae.encode(audio).latent_dist`, `vae.decode(latents)`, no scale
    wave = torch.from_numpy(tone(512, frequency=220.0).T)[None]
    with torch.no_grad():
        posterior = vae.encode(wave).latent_dist
        torch.testing.assert_close(data[0]["latents"], posterior.mode()[0], rtol=1e-5, atol=1e-5)
        heard = vae.decode(data[0]["latents"][None]).sample[0]
    assert torch.equal(data.decode(data[0]["latents"], vae), heard)
    drawn = LatentDataset(tmp_path / "store")
    noise = (drawn[0]["latents"] - raw[0]["mean"]) / (raw[0]["logvar"] / 2).exp()
    assert 0.5 < float(noise.std()) < 1.5


def test_processes_threads_and_stops_give_the_same_bytes(tmp_path: Path) -> None:
    vae, folder = tiny(OOBLECK, audio_channels=1), write_sounds(tmp_path / "sounds", 4, samples=1200)
    write_store(vae, opened(vae, folder), tmp_path / "one", **SETTINGS)
    write_store(vae, opened(vae, folder), tmp_path / "threads", **SETTINGS, encode_threads=3, num_workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "threads")
    source = opened(vae, folder)
    get, kind = type(source).__getitem__, type(source)

    class Stops(kind):  # type: ignore[misc, valid-type]
        def __getitem__(self, index: int) -> Any:
            if index == 8:
                raise KeyboardInterrupt
            return get(self, index)

    source.__class__ = Stops
    with pytest.raises(KeyboardInterrupt):
        write_store(vae, source, tmp_path / "stopped", **SETTINGS)
    assert not read_manifest(tmp_path / "stopped").complete
    write_store(vae, opened(vae, folder), tmp_path / "stopped", **SETTINGS)
    assert tree(tmp_path / "one") == tree(tmp_path / "stopped")


def test_a_store_of_sounds_is_maintained_as_any(tmp_path: Path) -> None:
    vae, folder, store = tiny(OOBLECK, audio_channels=1), write_sounds(tmp_path / "sounds", 4), tmp_path / "store"
    (folder / "bad.wav").write_bytes(encoded(tone(4000))[:-900])
    manifest = write_store(vae, opened(vae, folder), store, **SETTINGS)
    assert manifest.quarantined == 1 and "cut off" in (store / "quarantine.jsonl").read_text()
    again = reencode(store, manifest, vae, opened(vae, folder), 4)
    assert (again.samples, again.identical, again.problems) == (4, 4, ())
    shard = next((store / "shards").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + bytes(8))
    assert verify(store)
    repair(store, vae=lambda: vae, source=lambda: opened(vae, folder))
    assert shard.read_bytes() == whole and verify(store) == []
    # what was added is taken up, and a split and merge keep every row
    (folder / "more.wav").write_bytes(encoded(tone(700)))
    write_store(vae, opened(vae, folder), store, **SETTINGS, update=True)
    parts = split(store, tmp_path / "parts", 2)
    merge([tmp_path / "parts" / part.name for part in parts], tmp_path / "again")
    assert verify(tmp_path / "again") == [] and len(LatentDataset(tmp_path / "again")) == len(LatentDataset(store))
    # it is told of in words of sounds, and shown by spectrograms
    said, card = describe(store, read_manifest(store)), store_card("mine", read_manifest(store))
    assert f"encoded in fp32 at 512 samples at {RATE:,} Hz, latent shape 4x64" in said and "over sounds" in said
    for words in (
        f"{len(LatentDataset(store))} sounds as latents",
        "(channels x positions): 4x64",
        "# [c, n]",
        f"crops: 512 samples at {RATE:,} Hz",
    ):
        assert words in card
    with Image.open(io.BytesIO(contact_sheet(LatentDataset(store, sample=False), vae))) as sheet:
        assert sheet.size == (4 * 128, 4 * 128) and len(sheet.getcolors(128**2 * 16) or ()) > 20


def test_what_is_of_images_is_refused(tmp_path: Path) -> None:
    vae, folder = tiny(OOBLECK, audio_channels=1), write_sounds(tmp_path / "sounds")
    for field, more in (("views", {"views": "flip"}), ("pixels", {"pixels": True}), ("samples", {"resolution": 256})):
        with refused(UsageError, field):
            write_store(vae, opened(vae, folder), tmp_path / "store", **SETTINGS | more)
    with refused(UsageError, "samples"):
        opened(vae, folder, 500)
    with refused(UsageError, "sample_rate"):
        write_store(tiny("AutoencoderKL"), opened(vae, folder), tmp_path / "store", **SETTINGS)
    write_store(vae, opened(vae, folder), tmp_path / "store", **SETTINGS)
    with refused(UsageError, "kohya"):
        convert_to(tmp_path / "store", tmp_path / "out", "kohya")


def test_the_commands_encode_and_decode_sounds(tmp_path: Path) -> None:
    vae, folder = tiny(OOBLECK, audio_channels=1), write_sounds(tmp_path / "sounds", 2, samples=1200)
    saved, store = write_vae(vae, tmp_path / "vae", None), tmp_path / "store"
    call("encode", saved, folder, store, "--excerpt", "512", "--num_workers", "0")
    assert len(LatentDataset(store)) == 6
    for form, subtype in (("wav", "FLOAT"), ("flac", "PCM_24")):
        call("decode", store, tmp_path / form, "--sound_format", form)
        files = sorted((tmp_path / form).glob(f"*.{form}"))
        assert len(files) == 6 and soundfile.info(files[0]).subtype == subtype
        assert [soundfile.info(file).frames for file in files] == [512, 512, 176] * 2
        assert soundfile.info(files[0]).samplerate == RATE
    with torch.no_grad():
        expected = latents.decode(vae, LatentDataset(store, raw=True)[0]["mean"][None])[0]
    found, _ = soundfile.read(min((tmp_path / "wav").glob("*.wav")), dtype="float32")
    torch.testing.assert_close(torch.from_numpy(found), expected[0], rtol=1e-4, atol=1e-5)
    for flags in ((), ("--resolution", "64")):
        with refused(UsageError, "--excerpt"):
            call("encode", saved, folder, tmp_path / "other", *flags)
