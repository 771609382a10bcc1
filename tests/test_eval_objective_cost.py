"""eval.objective_cost: a closed form, and every term has its row."""

from __future__ import annotations

import sys

import pytest

from eval import objective_cost
from ldm_vae.core import config

VGG = ((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
       (256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512))  # fmt: skip
STEP = (0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)  # halvings before each convolution
TAPS = ((64, 0), (128, 1), (256, 2), (512, 3), (512, 4))


@pytest.mark.slow
def test_lpips_costs_what_vggs_convolutions_do() -> None:
    """3 x 3 convolutions for both images, and once more for the gradient with respect to the reconstruction; a weighted
    sum over channels at five depths, and its gradient."""
    pixels = [(64 >> step) ** 2 for step in range(5)]
    trunk = sum(2 * 9 * a * b * pixels[step] for (a, b), step in zip(VGG, STEP, strict=True))
    heads = sum(2 * channels * pixels[step] for channels, step in TAPS)
    own, autoencoder = objective_cost.count("lpips", 64)
    assert own * 1e9 == pytest.approx(3 * trunk + 2 * heads, rel=1e-9)
    assert autoencoder > own


@pytest.mark.slow
def test_every_term_has_its_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.objective_cost", "--resolution", "64"])
    objective_cost.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    of_sounds = ["multi_resolution_stft", "multi_scale_mel"]
    assert sorted([*(row[0].removeprefix("| ") for row in rows), *of_sounds]) == config.options("ldm_vae.losses")
    cost = {row[0].removeprefix("| "): float(row[1]) for row in rows}
    assert cost["kl"] == cost["l1"] == 0 and cost["lpips"] > cost["alignment"] > 0 and cost["drift"] > 0
