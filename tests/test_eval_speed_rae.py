"""An update of an AutoencoderRAE's decoder costs what diffusers' script does, and less from a store."""

from __future__ import annotations

import argparse

import pytest
import torch
from repository import ROOT
from tiny_classes import CONFIGS, tiny

from eval.speed import rae
from ldm_vae.core.flop_counter import Cost


def test_operations_beside_diffusers_script() -> None:
    vae = tiny("AutoencoderRAE")
    counts = {name: rae.count(vae, name) for name in rae.RECIPES}
    with Cost() as encoder, torch.no_grad():
        vae.encode(torch.zeros(1, 3, 32, 32))
    # the same work for the same objective; a store saves the encoder
    assert counts["ours"] == counts["diffusers"]
    assert counts["ours"] - counts["ours_from_store"] == encoder.flops > 0
    assert counts["ours_lpips_gan"] - counts["ours_lpips_gan_from_store"] == encoder.flops
    # the features of the images again, those of the reconstructions, and back through these
    assert counts["diffusers_with_encoder_loss"] - counts["diffusers"] > 2.9 * encoder.flops


def test_the_script_trains_the_decoder_alone() -> None:
    vae = tiny("AutoencoderRAE")
    rae.RECIPES["diffusers_with_encoder_loss"](vae)(torch.rand(1, 3, 32, 32))
    found = {name for name, value in vae.named_parameters() if value.grad is not None}
    assert found == {name for name, _ in vae.named_parameters() if name.startswith("decoder.")}


def test_the_whole_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rae, "PUBLISHED", CONFIGS["AutoencoderRAE"])
    rows = rae.run(argparse.Namespace())
    ratios = {row["ratio"]["to"]: row["ratio"]["median"] for row in rows}
    assert ratios["diffusers"] == 1 and ratios["ours_from_store"] < 1 < ratios["diffusers_with_encoder_loss"]
    assert ratios["ours_lpips_gan_from_store"] < 1


@pytest.mark.slow
def test_the_figures_of_the_page_are_of_the_published_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations grow by the same number with each further block: two depths of encoder and of decoder give those of
    the published forty blocks."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    published, knobs = dict(rae.PUBLISHED), ("encoder_num_hidden_layers", "decoder_num_hidden_layers")

    def counted(*deeper: str) -> list[tuple[float, float]]:
        """(ours, theirs) of each row at one block each, and two of what is named."""
        monkeypatch.setattr(rae, "PUBLISHED", published | {name: 1 + (name in deeper) for name in knobs})
        return [(row["value"], row["of"]) for row in rae.run(argparse.Namespace())]

    shallow, more = counted(), {name: counted(name) for name in knobs}
    assert len(shallow) == 4
    for number, counts in enumerate(shallow):
        value, of = (
            count + sum((published[name] - 1) * (more[name][number][side] - count) for name in knobs)
            for side, count in enumerate(counts)
        )
        assert f"| {of:.0f} | {of / value:.3g} |" in page.replace("**", ""), number
