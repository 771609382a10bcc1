"""Runs without values: what they find is found once for a class and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_classes import tiny

from ldm_vae.autoencoder import meta
from ldm_vae.autoencoder.fine_tuning import idle_parameters
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.lengths import lengths_of
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


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderVidTok"])
def test_measures_share_one_network_and_find_what_each_finds_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, built, build = tiny(name), list[Any](), meta.without_values
    monkeypatch.setattr(meta, "without_values", lambda given: built.append(given) or build(given))
    measures = [one.__wrapped__ for one in (geometry_of, lengths_of, idle_parameters)]
    alone = []
    for measure in measures:
        monkeypatch.setattr(meta, "_SHARED", {})
        alone.append(measure(vae))
    monkeypatch.setattr(meta, "_SHARED", {})
    built.clear()
    for order in (1, -1):  # whichever runs first leaves nothing for the next
        assert [measure(vae) for measure in measures[::order]] == alone[::order]
    assert len(built) == 1
