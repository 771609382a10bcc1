"""Samples of the page: a field has the statistics it is given, and files are where the page looks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ldm_vae.metrics.profile import radial_spectrum
from ldm_vae.metrics.samples import COUNT, field, keep_samples

FOUND = {
    "mean": [1.0, -2.0, 0.0, 0.5],
    "std": [1.0, 0.5, 2.0, 3.0],
    "spectrum": {"latents": [0.0, 9.0, 4.0, 1.0, 0.5, 0.25, 0.1, 0.1, 0.1]},
}


def test_a_field_has_the_measured_mean_deviation_and_spectrum() -> None:
    noise = torch.randn(4000, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = field(noise, FOUND)
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.tensor(FOUND["mean"]), atol=0.05, rtol=0)
    # the whole variance, of which the mean of each plane takes none here: its power is 0
    torch.testing.assert_close(made.std((0, 2, 3)), torch.tensor(FOUND["std"]), rtol=0.02, atol=0)
    found = radial_spectrum(made[:, :1]) / len(made)
    expected = torch.tensor(FOUND["spectrum"]["latents"], dtype=torch.float64)
    assert (found / found[1])[1:].tolist() == pytest.approx((expected / expected[1])[1:].tolist(), rel=0.05)


def test_pictures_are_written_and_replaced(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    keep_samples(tmp_path, tiny_vae, FOUND, 32, torch.device("cpu"))
    (tmp_path / "samples" / "old.png").touch()
    keep_samples(tmp_path, tiny_vae, FOUND, 32, torch.device("cpu"))
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == sorted(f"{kind}-{number}.png" for kind in ("normal", "field") for number in range(COUNT))
    one, two = (Image.open(tmp_path / "samples" / f"{kind}-0.png").copy() for kind in ("normal", "field"))
    assert one.size == (32, 32) and one.tobytes() != two.tobytes()
