"""Verbs on autoencoders of sounds: those that work, and the sentences of those that are of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from cli_call import call
from sentences import refused
from sound_files import RATE, encoded, tone, write_sounds
from tiny_classes import tiny

from ldm_vae import open_images
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tiny("AutoencoderOobleck", audio_channels=1), tmp_path / "vae", None)


def test_reconstruct_writes_sounds_before_and_after(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_sounds(tmp_path / "sounds", 2, samples=1003), tmp_path / "heard"
    (folder / "bad.wav").write_bytes(b"RIFF")
    call("reconstruct", vae, folder, out)
    said = capsys.readouterr()
    assert "left out" in said.err and said.out.count("SNR") == 2
    before, rate = soundfile.read(out / "tone0.before.wav", dtype="float32")
    after, _ = soundfile.read(out / "tone0.wav", dtype="float32")
    assert rate == RATE and before.shape == after.shape == (1003,)
    written = torch.from_numpy(tone(1003, frequency=220.0)[:, 0])
    assert torch.equal(torch.from_numpy(before), written)
    network = load_autoencoder(vae)
    with torch.no_grad():
        whole = torch.nn.functional.pad(written, (0, 5))[None, None]
        expected = latents.decode(network, latents.encode(network, whole).mean)[0, 0, :1003]
    torch.testing.assert_close(torch.from_numpy(after), expected, rtol=1e-5, atol=1e-6)
    call("reconstruct", vae, folder / "tone1.wav", out, "--excerpt", "256")
    assert soundfile.info(out / "tone1.wav").frames == 256


def test_reconstruct_refuses_what_is_no_sound(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.wav").write_bytes(encoded(tone(500))[:-100])
    with refused(UsageError, "cut.wav"):
        call("reconstruct", vae, tmp_path / "cut.wav", tmp_path / "out")
    with refused(UsageError, "--resolution"):
        call("reconstruct", vae, tmp_path / "cut.wav", tmp_path / "out", "--resolution", "64")


def test_an_export_carries_the_record(vae: Path, tmp_path: Path) -> None:
    call("export", vae, tmp_path / "out", "--target", "diffusers", "--sample_rate", RATE)
    network = load_autoencoder(tmp_path / "out")
    sounds = open_images(write_sounds(tmp_path / "sounds"), network, samples=512)
    assert sounds.decoding.sample_rate == RATE and sounds.decoding.channels == 1 and len(sounds) == 32


def test_verbs_of_images_say_so(vae: Path, tmp_path: Path) -> None:
    folder = write_sounds(tmp_path / "sounds", 2)
    calls: list[tuple[Any, ...]] = [
        ("tiling", vae, folder / "tone0.wav"), ("fp16", "audit", vae),
    ]  # fmt: skip
    for words in calls:
        with refused(UsageError, "VAE"):
            call(*words)
