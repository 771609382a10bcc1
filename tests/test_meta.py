"""Runs without values: what they find is found once for a class and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_classes import tiny

from ldm_vae.autoencoder.meta import once


def test_a_config_is_measured_once_whatever_its_normalisation(tmp_path: Path) -> None:
    """Training and export set the normalisation of every network, which changes no shape; a config that was read holds
    lists where one that was built holds tuples."""
    measured: list[Any] = []

    @once
    def channels(vae: Any, more: int) -> int:
        measured.append(vae)
        return int(vae.config.latent_channels) + more

    one, scaled, other = (
        tiny("AutoencoderKL"),
        tiny("AutoencoderKL", scaling_factor=0.5),
        tiny("AutoencoderKL", latent_channels=6),
    )
    assert channels(one, 1) == channels(one, 1) == channels(scaled, 1) == one.config.latent_channels + 1
    scaled.save_pretrained(tmp_path)
    assert channels(type(one).from_pretrained(tmp_path), 1) == channels(one, 1)
    assert channels(other, 1) == 7
    assert channels(one, 2) == one.config.latent_channels + 2
    assert [id(vae) for vae in measured] == [id(one), id(other), id(one)]
