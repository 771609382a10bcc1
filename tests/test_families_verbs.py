"""Every verb takes every autoencoder class of images, or refuses it in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_call import program, run_cli
from images import write_images
from tiny_classes import IMAGES, tiny

from eval import diffusability, latent_space
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.errors import UsageError

PROBE = "--layers 1 --heads 2 --head_dim 8 --train_images 8 --batch_size 4 --seeds 1 --samples 4 --steps 1"


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_every_verb_takes_it(name: str, tmp_path: Path) -> None:
    network = tiny(name)
    vae, images, store = tmp_path / "vae", tmp_path / "images", tmp_path / "store"
    network.save_pretrained(vae)
    write_images(images, 6, (40, 36))
    geometry = geometry_of(network)
    side, channels = ("--resolution", geometry.side or 32), ("--channels", geometry.in_channels)
    words = [
        ("encode", vae, images, store, *side, *channels),
        ("store", "verify", store, "--reencode", 2, "--data", images, "--vae", vae),
        ("store", "stats", store),
        ("decode", store, tmp_path / "decoded", "--count", 2, "--vae", vae),
        ("reconstruct", vae, min(images.iterdir()), tmp_path / "seen", *side, *channels),
        ("evaluate", vae, images, "--output", tmp_path / "measured", "--metrics", "psnr", *side, *channels),
        ("drift", vae, vae, images, "--no_lpips", *side, *channels),
        ("export", vae, tmp_path / "out", "--stats", images, *side, *channels),
    ]
    for line in words:
        assert run_cli(*line) == 0, line[0]
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 2
    program(latent_space, vae, images, "--output", tmp_path / "space", "--likelihood_images", 2, *side, *channels)
    probe = (vae, images, "--output", tmp_path / "probe", *PROBE.split(), *side, *channels)
    if geometry.in_channels == 4:
        with pytest.raises(UsageError, match="channels"):
            program(diffusability, *probe)
    else:
        program(diffusability, *probe)
    # what needs the very layers of AutoencoderKL says so
    for line in [("fp16", "audit", vae), ("tiling", vae, min(images.iterdir()))]:
        assert run_cli(*line, *channels) == (0 if name == "AutoencoderKL" else 2), line[0]
