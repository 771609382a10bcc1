"""Residual codes of sounds: trained against the waveform heads, resumed, exported, stored, decoded at any number of
codebooks, and coded part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from cli_call import call
from prior_runs import run as run_prior
from prior_runs import write_config as write_prior
from sentences import refused
from sound_files import RATE
from sound_runs import sound_config
from tiny_classes import tiny
from training_runs import metrics, run

from ldm_vae import LatentDataset
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import keep_first
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.store_card import store_card
from ldm_vae.latent_store import read_manifest, verify
from ldm_vae.prior.generator import CodeGenerator

CODEC: dict[str, Any] = {
    "model": {"kind": "causal_oobleck", "audio_channels": 1, "sampling_rate": RATE, "encoder_hidden_size": 8,
              "decoder_channels": 8, "decoder_input_channels": 4, "downsampling_ratios": [2, 4],
              "channel_multiples": [1, 2]},
    "quantizer": {"kind": "residual", "codebooks": 3, "codes": 16, "restart_images": 8, "dropout": 0.5},
    "losses": {"multi_scale_mel": {"windows": [32, 64], "bands": [5, 10]}, "commitment": {}},
    "adversary": {"weight": 0.5, "loss": "least_squares", "feature_matching": 5.0, "adaptive": False},
    "discriminator": {"kind": "waveform", "periods": [2], "windows": [64], "period_width": 4, "stft_width": 4},
    "max_train_images": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a codec, its sounds, and in store/ their indices."""
    folder = tmp_path_factory.mktemp("home")
    done = run(sound_config(folder, **CODEC))
    assert done.returncode == 0, done.stderr
    call("encode", folder / "run", folder / "sounds", folder / "store", "--excerpt", "512", "--num_workers", "0")
    return folder


def excerpt(home: Path, index: int) -> torch.Tensor:
    sound, _ = soundfile.read(home / "sounds" / "tone0.wav", dtype="float32")
    return torch.from_numpy(sound[index * 512 :][:512])[None, None]


def test_a_codec_of_codes_trains(home: Path) -> None:
    last = metrics(home / "run")[-1]
    assert {f"codes/usage/{level}" for level in (1, 2, 3)} <= last.keys() and last["adversary/feature_matching"] > 0


def test_export_card_and_store_say_the_rate(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = f"12 bits a position, {12 * RATE / 8:,.0f} bits per second"
    call("export", home / "run", tmp_path / "out")
    call("store", "stats", home / "store")
    assert capsys.readouterr().out.count(rate) == 2
    assert rate in (tmp_path / "out" / "README.md").read_text()
    ours, theirs = (load_autoencoder(place) for place in (home / "run", tmp_path / "out"))
    x = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(latents.decode(ours, latents.encode(ours, x).mean),
                       latents.decode(theirs, latents.encode(theirs, x).mean))  # fmt: skip


def test_a_store_of_sounds_holds_the_indices_of_every_codebook(home: Path) -> None:
    vae, data, manifest = load_autoencoder(home / "run"), LatentDataset(home / "store"), read_manifest(home / "store")
    assert (manifest.identity.codes, manifest.identity.codebooks, manifest.shards[0].shape) == (16, 3, (3, 64))
    found = data[1]["indices"]
    z = latents.encode(vae, excerpt(home, 1)).mean
    assert torch.equal(found[None], latents.nearest_codes(vae, z)) and verify(home / "store") == []
    torch.testing.assert_close(data.decode(found, vae), latents.decode(vae, z)[0], rtol=1e-5, atol=1e-6)
    assert "int64 [q, n]" in store_card("mine", manifest)


def test_the_first_codes_of_a_long_code_are_the_code_of_fewer_codebooks(home: Path, tmp_path: Path) -> None:
    """Through all: a network that has two of the three, a store of all three decoded at two, and reconstruct."""
    vae, two = load_autoencoder(home / "run"), keep_first(load_autoencoder(home / "run"), 2, "")
    x = excerpt(home, 0)
    z, stored = latents.encode(two, x).mean, LatentDataset(home / "store")[0]["indices"][None]
    assert torch.equal(latents.nearest_codes(two, z), stored[:, :2])
    expected = latents.decode(two, z)
    torch.testing.assert_close(latents.decode_indices(vae, stored[:, :2]), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(latents.decode_indices(vae, stored), expected, rtol=1e-3, atol=1e-4)
    call("decode", home / "store", tmp_path / "heard", "--codebooks", "2", "--count", "1")
    call("reconstruct", home / "run", home / "sounds" / "tone0.wav", tmp_path / "seen", "--codebooks", "2", "--excerpt",
         "512")  # fmt: skip
    for file in (*(tmp_path / "heard").glob("*.wav"), tmp_path / "seen" / "tone0.wav"):
        heard = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
        torch.testing.assert_close(heard, expected[0, 0], rtol=1e-5, atol=1e-6)


def test_codes_part_by_part_are_those_of_the_whole_sound(home: Path) -> None:
    vae, x = load_autoencoder(home / "run").double(), excerpt(home, 0).double()
    whole = latents.nearest_codes(vae, vae.encode(x).latent_dist.mean)
    state = after = None
    indices, sounds = [], []
    for part in x.split(5, dim=2):  # of less than a hop: some parts give no code
        posterior, state = vae.encode_part(part, state)
        indices.append(vae.quantizer.indices(posterior.mean))
        samples, after = vae.decode_part(vae.quantizer.vectors(indices[-1]).double(), after)
        sounds.append(samples)
    assert torch.equal(torch.cat(indices, dim=2), whole)
    decoded = vae.decode(vae.quantizer.vectors(whole).double()).sample
    torch.testing.assert_close(torch.cat(sounds, dim=2), decoded, rtol=0, atol=1e-12)


def test_a_prior_in_delay_order_learns_them_and_its_samples_are_heard(home: Path, tmp_path: Path) -> None:
    model = {"kind": "transformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
             "order": "delay"}  # fmt: skip
    done = run_prior(write_prior(tmp_path, home / "store", model=model, max_train_images=8, validation_images=8))
    assert done.returncode == 0, done.stderr
    generator = CodeGenerator.load(tmp_path / "run", load_autoencoder(home / "run"))
    samples = generator.pixels([0])
    assert generator.indices([0]).shape == (1, 3, 64) and samples.shape == (1, 1, 512)
    heard, rate = soundfile.read(tmp_path / "run" / "samples" / "images-000000008" / "0000.wav", dtype="float32")
    torch.testing.assert_close(torch.from_numpy(heard), samples[0, 0], rtol=1e-4, atol=1e-5)
    assert rate == RATE and "bits per second" in done.stdout and "pixel" not in done.stdout
    assert "per sample" in (tmp_path / "run" / "report" / "index.html").read_text()


def test_a_number_of_codebooks_that_is_not_there_is_refused(home: Path, tmp_path: Path) -> None:
    with refused(UsageError, "--codebooks"):
        call("decode", home / "store", tmp_path / "heard", "--codebooks", "4")
    assert not (tmp_path / "heard").exists()
    with refused(UsageError, "--codebooks"):
        call("reconstruct", home / "run", home / "sounds", tmp_path / "heard", "--codebooks", "0")
    gaussian = write_vae(tiny("AutoencoderOobleck", audio_channels=1), tmp_path / "vae", None)
    with refused(UsageError, "--codebooks"):
        call("reconstruct", gaussian, home / "sounds", tmp_path / "heard", "--codebooks", "1")
