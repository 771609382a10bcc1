"""Spectrum and equivariance: what noise, a wave and networks that commute by construction must give."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ldm_vae.latent_space.equivariance import TRANSFORMATIONS, applicable, equivariance_error
from ldm_vae.latent_space.spectrum import high_frequency_share, radial_power_spectrum, white_share


class Commuting:
    """Encodes by averaging squares of 2 x 2 pixels and decodes by repeating them: commutes with quarter turns."""

    dtype = torch.float32
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def encode(self, pixels: torch.Tensor) -> Any:
        return SimpleNamespace(latents=F.avg_pool2d(pixels, 2) + self.shift)

    def decode(self, z: torch.Tensor) -> Any:
        return SimpleNamespace(sample=F.interpolate(z - self.shift, scale_factor=2.0))


class Turned(Commuting):
    """The same, but its latent lies on its side, so that it commutes with half a turn only."""

    def encode(self, pixels: torch.Tensor) -> Any:
        return SimpleNamespace(latents=super().encode(pixels).latents.flip(3))

    def decode(self, z: torch.Tensor) -> Any:
        return super().decode(z.flip(3))


def smooth(count: int = 4, side: int = 16) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def test_the_spectrum_of_white_noise_is_flat_and_of_a_wave_one_line() -> None:
    noise = torch.randn(400, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert radial_power_spectrum(noise)[1:].tolist() == pytest.approx([1.0] * 8, rel=0.06)
    share = high_frequency_share(noise)
    assert share.mean().item() == pytest.approx(white_share(16, 16), abs=0.005)
    assert white_share(256, 256) == pytest.approx(1 - math.pi / 16, abs=0.005)

    place = torch.arange(16) / 16
    for cycles, high in ((2, 0.0), (4, 0.0), (5, 1.0)):  # of 16 positions; half of the highest frequency is 4
        wave = 3.0 + torch.sin(2 * math.pi * cycles * place).expand(1, 1, 16, 16)
        power = radial_power_spectrum(wave)
        assert int(power.argmax()) == cycles
        assert high_frequency_share(wave).item() == pytest.approx(high, abs=1e-9)
    assert high_frequency_share(torch.ones(1, 2, 8, 8)).item() == 0.0
    assert high_frequency_share(torch.ones(1, 2, 1, 1)).item() == 0.0


def test_an_encoder_that_commutes_has_no_error_and_one_that_does_not_has() -> None:
    found = equivariance_error(Commuting(), smooth())
    assert list(found) == list(TRANSFORMATIONS)
    for name in ("rotate_90", "rotate_180", "rotate_270"):
        assert found[name].latent.tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert 0 < found["scale_0.5"].latent.max() < 0.1  # the two antialiasings differ a little
    turned = equivariance_error(Turned(), smooth())
    assert turned["rotate_180"].latent.max() < 1e-12 < 0.3 < turned["rotate_90"].latent.min()
    assert (turned["rotate_90"].psnr < found["rotate_90"].psnr - 3).all()


def test_a_shift_of_the_latent_space_makes_no_error_small() -> None:
    center = torch.zeros(3)
    plain = equivariance_error(Turned(), smooth(), center)
    shifted = equivariance_error(Turned(shift=100.0), smooth(), center + 100.0)
    for name, expected in plain.items():
        torch.testing.assert_close(shifted[name].latent, expected.latent, rtol=1e-3, atol=1e-6)


def test_the_pixel_side_is_the_psnr_of_what_is_decoded(tiny_vae: AutoencoderKL) -> None:
    images = smooth()
    found = equivariance_error(tiny_vae, images, transformations={"r": TRANSFORMATIONS["rotate_90"]})["r"]
    with torch.no_grad():
        decoded = tiny_vae.decode(torch.rot90(tiny_vae.encode(images).latent_dist.mean, 1, (2, 3))).sample
    error = (torch.rot90(images, 1, (2, 3)) - decoded.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    assert found.psnr.tolist() == pytest.approx((10 * torch.log10(4 / error)).tolist(), abs=0.05)  # 8 bits


def test_only_what_a_latent_can_undergo_is_asked_of_it() -> None:
    assert applicable(1, 1) == {}
    assert list(applicable(5, 5)) == ["rotate_90", "rotate_180", "rotate_270"]
    assert list(applicable(4, 4)) == list(TRANSFORMATIONS)
