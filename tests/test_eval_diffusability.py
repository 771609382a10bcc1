"""The probe: networks that do equal work, sentences that claim no more than intervals allow, and, trained in earnest,
a ranking of two VAEs that were made to differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_runs import SMALL
from images import write_images
from sentences import refused

from eval import diffusability, scramble
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.diffusion.probe import match
from ldm_vae.diffusion.probe_result import markdown, summarised, verdicts
from ldm_vae.metrics.batches import image_batches

BASE = DiT(num_layers=2, num_attention_heads=2, attention_head_dim=16)


# --- equal work -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_latents_of_other_shapes_get_equal_tokens_and_operations() -> None:
    shapes = [(8, 16, 16), (4, 32, 32), (64, 8, 8)]
    found = match(shapes, BASE, most_tokens=64)
    assert [one.tokens for one in found] == [64, 64, 64]
    assert [one.config.patch_size for one in found] == [2, 4, 1]
    for one in found:
        assert one.gflop == pytest.approx(found[0].gflop, rel=0.05)


@pytest.mark.slow
def test_a_width_is_moved_where_patches_alone_do_not_do() -> None:
    """A token of 1,024 numbers costs so much at its border that the network must be narrower."""
    shapes = [(4, 8, 8), (256, 16, 16)]
    same, narrower = match(shapes, BASE, most_tokens=64, tolerance=0.15)
    assert narrower.config.attention_head_dim < same.config.attention_head_dim == 16
    assert narrower.gflop == pytest.approx(same.gflop, rel=0.16)
    with refused(UsageError, "tolerance"):
        match(shapes, BASE, most_tokens=64, tolerance=0.001)


@pytest.mark.parametrize(
    ("shapes", "field"),
    [([(4, 8, 6)], "resolution"), ([(4, 8, 8), (4, 3, 3)], "vae")],
)
def test_what_cannot_be_matched_is_one_sentence(shapes: list[tuple[int, int, int]], field: str) -> None:
    with refused(UsageError, field):
        match(shapes, BASE)


# --- what is claimed --------------------------------------------------------------------------------------------------


def entry(name: str, fd_reconstructions: float, *fd_samples: float) -> dict[str, Any]:
    runs = [{"seed": seed, "loss": 1.0, "fd_samples": value} for seed, value in enumerate(fd_samples)]
    share = {"mean": 0.5, "ci95": None, "n": 1}
    network = {"tokens": 64, "gflop_per_image": 1.0}
    return summarised({
        "vae": {"name": name}, "fd_reconstructions": fd_reconstructions, "runs": runs, "latent_shape": [4, 8, 8],
        "network": network, "metrics": {"high_frequency_share": share, "equivariance": share},
    })  # fmt: skip


def test_the_gap_is_over_the_vaes_own_reconstructions_with_students_interval() -> None:
    found = entry("a", 10.0, 29.0, 30.0, 31.0)["metrics"]["fd_gap"]
    assert found["mean"] == pytest.approx(20) and found["n"] == 3
    assert found["ci95"] == pytest.approx([20 - 4.30265 / 3**0.5, 20 + 4.30265 / 3**0.5])


def test_a_difference_is_claimed_where_intervals_are_apart_and_nowhere_else() -> None:
    good, close, bad = entry("good", 10, 29, 30, 31), entry("close", 9, 30, 31, 32), entry("bad", 10, 59, 60, 61)
    said = verdicts([bad, good, close])
    assert len(said) == 3
    assert said[0].startswith("good and close: no difference shown")
    assert said[1].startswith("A diffusion model learns the latents of good better than those of bad: gap 20.0 (17.5")
    assert verdicts([entry("a", 0, 1), entry("b", 0, 99)]) == [
        "a and b: no difference shown, one seed has no interval."
    ]


def test_losses_stand_in_the_table_within_one_latent_shape_only() -> None:
    protocol = {"metric": "fd_efflite0", "samples": 8, "seeds": 3, "train_images": 8, "resolution": 16}
    found = [entry("a", 1, 2, 3), entry("b", 1, 2, 3)]
    assert "loss" in markdown({"vaes": found, "verdicts": [], "protocol": protocol}).splitlines()[0]
    found[1]["latent_shape"] = [8, 8, 8]
    assert "loss" not in markdown({"vaes": found, "verdicts": [], "protocol": protocol}).splitlines()[0]


# --- the program ------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.diffusability", *arguments])
    diffusability.main()


def random_vae(folder: Path, seed: int, channels: int) -> str:
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=channels
    )
    config.build().save_pretrained(folder)
    return str(folder)


@pytest.mark.usefixtures("few_features")
def test_the_program_measures_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", 6, size=(20, 20))
    vaes = [random_vae(tmp_path / name, number, 3 + number) for number, name in enumerate(("one", "other"))]
    flags = ["--output", str(tmp_path / "out"), *SMALL, "--train_images", "24", "--batch_size", "4", "--seeds", "2"]
    run(monkeypatch, *vaes, str(images), *flags)
    out = tmp_path / "out"
    found = json.loads((out / "diffusability.json").read_text())
    assert [one["latent_shape"] for one in found["vaes"]] == [[3, 8, 8], [4, 8, 8]]
    assert found["protocol"]["samples"] == 6 and len(found["verdicts"]) == 1
    for one in found["vaes"]:
        assert len(one["runs"]) == 2 and one["runs"][0]["fd_samples"] != one["runs"][1]["fd_samples"]
        assert 0 < one["metrics"]["high_frequency_share"]["mean"] < 1 and one["metrics"]["equivariance"]["mean"] > 0
        assert all((out / picture).is_file() for picture in one["pictures"].values())
    page = (out / "index.html").read_text()
    assert "What a diffusion model learns on these latents" in page and found["verdicts"][0].split(",")[0] in page

    def trained_again(*_: object) -> None:
        raise AssertionError("what is finished is not done again")

    monkeypatch.setattr(diffusability, "fit", trained_again)
    run(monkeypatch, *vaes, str(images), *flags)
    assert json.loads((out / "diffusability.json").read_text())["vaes"] == found["vaes"]
    with pytest.raises(AssertionError, match="not done again"):
        run(monkeypatch, *vaes, str(images), *flags, "--learning_rate", "1e-4")


def test_the_scrambled_vae_reconstructs_the_same_from_other_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images", 6, size=(20, 20))
    monkeypatch.setattr(
        sys, "argv", ["scramble", random_vae(tmp_path / "vae", 0, 4), str(images), str(tmp_path / "other"),
                      "--resolution", "16"],
    )  # fmt: skip
    scramble.main()
    batch = next(iter(image_batches(open_source(images), None, 16, batch_size=6)))
    pixels = to_pixels(batch.pixels)
    found, spectra = [], []
    for name in ("vae", "other"):
        vae = load_autoencoder(tmp_path / name)
        mean = latents.encode(vae, pixels).mean
        found.append(latents.decode(vae, mean))
        spectra.append(torch.linalg.eigvalsh(mean.permute(1, 0, 2, 3).flatten(1).double().cov()))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=0)
    # the order of the variances is turned round, their sum is not
    assert float(spectra[1].sum()) == pytest.approx(float(spectra[0].sum()), rel=1e-3)
    ratio = spectra[1] * spectra[0].flip(0)
    assert ratio.tolist() == pytest.approx([float(ratio[0])] * 4, rel=0.02)


# --- does it rank? ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_probe_ranks_two_vaes_that_were_made_to_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", 64, size=(16, 16))
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1).build()
    batches = image_batches(open_source(images), None, 16, batch_size=64)
    pixels = to_pixels(next(iter(batches)).pixels)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for step in range(150):
        chosen = pixels[torch.arange(step * 8, step * 8 + 8) % 64]
        loss = (vae.decode(vae.encode(chosen).latent_dist.mean).sample - chosen).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.save_pretrained(tmp_path / "plain")
    argv = ["scramble", str(tmp_path / "plain"), str(images), str(tmp_path / "scrambled"), "--resolution", "16"]
    monkeypatch.setattr(sys, "argv", argv)
    scramble.main()
    run(
        monkeypatch, str(tmp_path / "scrambled"), str(tmp_path / "plain"), str(images),
        "--output", str(tmp_path / "out"),
        "--resolution", "16", "--layers", "2", "--heads", "2", "--head_dim", "24", "--most_tokens", "16",
        "--train_images", "2400", "--learning_rate", "2e-3", "--steps", "12", "--samples", "32",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "diffusability.json").read_text())
    assert found["verdicts"][0].startswith(
        "A diffusion model learns the latents of plain better than those of scrambled: gap"
    )
    scrambled, plain = (one["fd_reconstructions"] for one in found["vaes"])
    assert scrambled == pytest.approx(plain, rel=0.02)  # it is not the autoencoder that differs
