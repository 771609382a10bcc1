"""The discriminator's regularisers against closed forms, and a monitor that warns of a sick game and of no healthy
one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_call import call
from fork_server import fork
from images import write_images
from PIL import Image
from torch import nn
from training_runs import metrics, run, write_config

from ldm_vae.report.training import health
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.monitor import diagnose, overfitting
from train import autoencoder as training_program

# --- regularisers -----------------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_its_weight() -> None:
    # D(x) = mean over patches of (w * x): the gradient of an image is w / patches at every place it is read
    layer = nn.Conv2d(3, 1, 2, stride=2, bias=False)
    real = torch.randn(4, 3, 6, 6, requires_grad=True)
    penalty = Adversary(AdversaryConfig(r1_weight=10.0, r1_every=4)).r1(real, layer(real))
    patches = 9
    expected = 0.5 * 10.0 * 4 * layer.weight.detach().square().sum().item() / patches
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 10.0 * 4 * layer.weight.detach() / patches)


def test_r1_is_lazy_and_counts_updates() -> None:
    game = Adversary(AdversaryConfig(r1_weight=1.0, r1_every=4))
    assert [game.r1_due(images, 8) for images in range(0, 64, 8)] == [True, False, False, False] * 2
    assert not Adversary(AdversaryConfig()).r1_due(0, 8)


@pytest.mark.parametrize("frames", [1, 3])
def test_lecam_is_the_papers(frames: int) -> None:
    """Of clips whose frames are judged one by one there are more logits, and no more images."""
    game = Adversary(AdversaryConfig(lecam_weight=0.5, lecam_halflife_images=4)).double()
    draw = torch.Generator().manual_seed(0)
    averages = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 6):
        real, fake = (torch.randn(4 * frames, 1, 3, 3, generator=draw, dtype=torch.float64) for _ in range(2))
        loss = game.lecam(real, fake, 4)
        game.after_update()
        if step == 1:
            assert loss.item() == 0.0  # there is no average yet
        else:
            real_average, fake_average = averages / (1 - 0.5 ** (step - 1))
            expected = (real - fake_average).clamp_min(0).square() + (real_average - fake).clamp_min(0).square()
            assert loss.item() == pytest.approx(0.5 * expected.mean().item(), rel=1e-9)
        # four images an update are a half-life: each counts twice the one before
        averages = averages * 0.5 + 0.5 * torch.stack([real.mean(), fake.mean()])
        torch.testing.assert_close(game.averages, averages / (1 - 0.5**step))
    assert set(game.state_dict()) == {"averages", "updates"}


# --- the monitor ------------------------------------------------------------------------------------------------------


def line(real: float = 0.8, fake: float = 0.7, margin: float = 1.0, **more: float) -> dict[str, Any]:
    accuracies = {"health/real_accuracy": real, "health/fake_accuracy": fake, "health/logit_margin": margin}
    return {"loss/total": 1.0, "gradient_norm/autoencoder": 0.1, "gradient_norm/discriminator": 0.1} | accuracies | more


@pytest.mark.parametrize(
    ("sick", "name", "remedy"),
    [
        (line(0.99, 1.0, 9.0), "saturated", "discriminator_learning_rate"),
        (line(0.5, 0.5, 0.0), "blind", "raise discriminator_learning_rate"),
        (line(0.2, 0.3, -1.0), "fooled", "lower adversary.weight"),
        (line(**{"adversary/weight_on_sums": 5e3}), "ceiling", "r1_weight"),
    ],
)
def test_a_state_is_named_when_it_lasts(sick: dict[str, Any], name: str, remedy: str) -> None:
    healthy = [line() for _ in range(15)]
    config = AdversaryConfig(weight=0.5)
    assert diagnose(healthy, config) == {}
    copies = [dict(sick) for _ in range(3)]
    assert diagnose([*healthy, *copies[:2]], config) == {}  # single intervals of a healthy game look like any
    found = diagnose([*healthy, *copies], config)
    assert list(found) == [name] and remedy in found[name]
    assert diagnose([*healthy, *copies, line()], config) == {}


def test_a_jump_of_a_gradient_norm_is_seen_at_once() -> None:
    healthy = [line() for _ in range(12)]
    found = diagnose([*healthy, line(**{"gradient_norm/autoencoder": 5.0})], AdversaryConfig())
    assert list(found) == ["jump_autoencoder"] and "jumped to 5" in found["jump_autoencoder"]


def test_before_the_discriminator_plays_there_is_nothing_to_say() -> None:
    sick = [line(1.0, 1.0, 9.0) for _ in range(3)]
    validation = {"validation/psnr": 20.0}
    assert diagnose([{"loss/total": 1.0}] * 20, AdversaryConfig()) == {}
    assert list(diagnose([*sick, validation], AdversaryConfig())) == ["saturated"]  # a validation's line is no interval


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 0.3], ids=["healthy", "sick"])
def test_a_run_made_sick_on_purpose_says_so(tmp_path: Path, rate: float | None) -> None:
    """A discriminator whose rate is a hundred times too high, against an autoencoder that hardly learns."""
    settings = {
        "output_dir": str(tmp_path / "run"),
        "resolution": 32,
        "train_batch_size": 4,
        "learning_rate": 1e-4 if rate is None else 1e-7,
        "discriminator_learning_rate": 2e-4 if rate is None else 1e-2,
        "max_train_images": 160,
        "log_every_images": 16,
        "dataloader_num_workers": 0,
        "normalisation_images": 4,
        "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
        "losses": {"l1": {"weight": 1.0}},
        "adversary": {"weight": 0.5, "r1_weight": 1.0 if rate is None else 0.0, "lecam_weight": 0.01},
        "discriminator": {"kind": "patchgan", "width": 8, "layers": 1},
        "data": {"kind": "folder", "path": str(write_images(tmp_path / "images", 8))},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = fork(training_program.main, [str(tmp_path / "config.yaml")]).wait()
    assert done.returncode == 0, done.stderr
    log = [json.loads(entry) for entry in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    said = {name for entry in log for name in entry.get("warnings", {})}
    section = health(log, settings)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert section is not None and 'id="health"' in page
    if rate is None:
        assert "saturated" not in said
        assert {"adversary/r1", "adversary/lecam"} <= set(log[0])
    else:
        assert "saturated" in said and "the discriminator has won" in page
        assert "warning at" in done.stderr and done.stderr.count("the discriminator has won") == 1  # once, not at each


# --- overfitting ------------------------------------------------------------------------------------------------------


def history(*validations: tuple[float, float], **others: float) -> list[dict[str, Any]]:
    """A log: for each pair (LPIPS, loss), two intervals whose losses have this mean, and a validation."""
    log: list[dict[str, Any]] = []
    for number, (score, loss) in enumerate(validations, 1):
        log += [
            {"images": 100 * number + shift, "loss/total": loss * (1 + sign * 0.05)}
            for shift, sign in ((-50, 1), (0, -1))
        ]
        log.append({"images": 100 * number, "validation/lpips_alex": score, **others})
    return log


FALLING = [(0.3, 1.0), (0.2, 0.8), (0.21, 0.7), (0.22, 0.6), (0.23, 0.5)]


def test_held_out_metrics_that_get_worse_while_the_objective_falls_are_overfitting() -> None:
    folder = Path("my runs/one")
    found = overfitting(history(*FALLING), "lpips_alex", folder)
    assert list(found) == ["overfitting"]
    assert "images-000000200" in found["overfitting"]
    assert "`ldm-vae export 'my runs/one' OUT --checkpoint best`" in found["overfitting"]
    assert overfitting(history(*FALLING[:4]), "lpips_alex", folder) == {}  # two of them may be chance


@pytest.mark.parametrize(
    "healthy",
    [
        [*FALLING[:4], (0.203, 0.5)],  # within 2 % of the best
        [*FALLING, (0.19, 0.4)],  # a better one since
        [(0.3, 1.0), (0.2, 0.8), (0.21, 0.7), (0.22, 0.9), (0.23, 0.7)],  # the objective rose: it is not learning
        [(0.2, 0.5), (0.21, 0.8), (0.22, 0.9), (0.23, 1.0)],
        [],
    ],
)
def test_a_healthy_or_an_otherwise_sick_run_does_not_overfit(healthy: list[tuple[float, float]]) -> None:
    assert overfitting(history(*healthy), "lpips_alex", Path("run")) == {}


def test_metrics_that_trade_are_no_overfitting() -> None:
    """PSNR fell by more than 0.17 dB, as an adversary or LPIPS makes it, and LPIPS got better."""
    log = history(*[(0.3 - 0.01 * place, 1 - 0.1 * place) for place in range(5)])
    for place, line in enumerate(line for line in log if "validation/lpips_alex" in line):
        line["validation/psnr"] = 30.0 - 0.2 * place
    assert overfitting(log, "psnr", Path("run")) == {}
    for line in log:
        line.pop("validation/lpips_alex", None)
    assert list(overfitting(log, "psnr", Path("run"))) == ["overfitting"]
    for line in log:
        if "validation/psnr" in line:
            line["validation/psnr"] = 30.0 - (30.0 - line["validation/psnr"]) / 8  # 0.1 dB at the end
    assert overfitting(log, "psnr", Path("run")) == {}


@pytest.mark.slow
def test_a_run_that_overfits_says_so_and_its_command_works(tmp_path: Path) -> None:
    """Two dark pictures over and over: what was learned of pictures at first is unlearned, and bright ones suffer."""
    for name, (low, high) in {"train": (0, 60), "heldout": (120, 256)}.items():
        (tmp_path / name).mkdir()
        draw = np.random.default_rng(len(name))
        for index in range(2):
            coarse = Image.fromarray(draw.integers(low, high, (4, 4, 3), dtype=np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / name / f"{index}.png")
    config = write_config(
        tmp_path, tmp_path / "train", max_train_images=96, train_batch_size=4, adversary={"weight": 0.0},
        discriminator=None, checkpoints_total_limit=1, validate_every_images=16, validation_images=2,
        validation_metrics=["psnr"], best_metric="psnr", learning_rate=3e-3, ema_halflife_images=2,
        validation_data={"kind": "folder", "path": str(tmp_path / "heldout")},
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr
    said = re.search(r"the network overfits: .*`ldm-vae (export .*)`", done.stdout)
    assert said is not None, metrics(tmp_path / "run")
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "the network overfits" in page and "--checkpoint best" in page
    call(*shlex.split(said[1].replace(" OUT ", f" {tmp_path}/out ")))
    best = max(
        (line for line in metrics(tmp_path / "run") if "validation/psnr" in line),
        key=lambda line: line["validation/psnr"],
    )
    assert best["images"] < 64 and f"{best['images']} images seen" in (tmp_path / "out" / "README.md").read_text()
