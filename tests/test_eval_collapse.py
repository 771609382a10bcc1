"""eval.collapse: its decoder is autoregressive, its files have the shape that the docs show, and what it demonstrates
is so: without a remedy the latent collapses, with one it does not."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from sentences import refused

from eval import collapse
from ldm_vae.core.errors import UsageError

NAMES = ["none", "annealing", "free bits", "target KL"]


def test_a_pixel_is_predicted_from_z_and_from_all_pixels_before_it_and_no_other() -> None:
    torch.manual_seed(0)
    decoder = collapse.StrongDecoder()
    assert not decoder.first.weight[:, : collapse.CHANNELS].any()  # as it was alone
    torch.nn.init.normal_(decoder.first.weight)
    z = torch.randn(1, collapse.CHANNELS, 1, 1, requires_grad=True)
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    for pixel in (0, 1, 17, 63):
        logit = decoder(images, z).flatten()[pixel]
        of_images, of_z = torch.autograd.grad(logit, [images, z])
        seen = of_images.flatten() != 0
        assert seen[:pixel].all() and not seen[pixel:].any() and of_z.all()


def test_digits_are_drawn_by_their_grey() -> None:
    greys = torch.tensor([-1.0, -0.5, 0.0, 1.0]).expand(4000, 4)
    drawn = collapse.draw(greys, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(drawn.mean(dim=0), greys[0], rtol=0, atol=0.05)
    assert drawn[:, 0].eq(-1).all() and drawn[:, 3].eq(1).all()


@pytest.mark.slow
def test_the_command_writes_its_table_its_curves_and_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--decoder_images", "32", "--images", "160", "--batch_size", "16", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["eval.collapse", "--output", str(tmp_path / "out"), *sizes])
    collapse.main()
    found = json.loads((tmp_path / "out" / "collapse.json").read_text())
    assert [(one["seed"], one["remedy"]) for one in found] == [(seed, name) for seed in (0, 1) for name in NAMES]
    for one in found:
        assert one["before"] == one["curve"][0] and one["after"] == one["curve"][-1]
        images = [point["images"] for point in one["curve"]]
        assert images == sorted(set(images)) and images[0] == 0 and images[-1] == 160
        assert one["after"].keys() == {"images", *collapse.FIGURES}
    # one decoder of a seed for all four, another for the next
    before = [one["before"]["elbo/nats_per_image"] for one in found]
    assert len(set(before[:4])) == len(set(before[4:])) == 1 and before[0] != before[4]
    written = (tmp_path / "out" / "collapse.md").read_text()
    assert [line.split(" | ")[0] for line in written.splitlines()[2:]] == [f"| {name}" for name in NAMES]
    assert written in capsys.readouterr().out
    assert (tmp_path / "out" / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_the_spread_of_seeds_is_shown_where_there_is_one() -> None:
    assert collapse.spread([8.0, 8.0], 0) == "8"
    assert collapse.spread([3.0, 3.5, 2.5], 2) == "3.00 (2.50 to 3.50)"


@pytest.mark.parametrize(("flags", "field"), [(["--seeds", "0"], "seeds"), (["--images", "5"], "images")])
def test_a_wrong_call_is_refused(flags: list[str], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.collapse", "--output", str(tmp_path), *flags])
    with refused(UsageError, field):
        collapse.main()


@pytest.mark.slow
def test_without_a_remedy_the_latent_collapses_and_with_one_it_does_not() -> None:
    images, batch = 12_800, 64
    strong = collapse.pretrain(images, batch, 0)
    after = {
        name: collapse.run(name, term, copy.deepcopy(strong), images, batch, 0)["after"]
        for name, term in collapse.remedies(images).items()
    }
    # at the threshold there is noise: a channel of a hundredth of a nat
    assert after["none"]["active_units"] <= 1 and after["none"]["kl_nats_per_image"] < 0.1
    for name in NAMES[1:]:
        assert after[name]["active_units"] == collapse.CHANNELS and after[name]["kl_nats_per_image"] > 0.3, name
