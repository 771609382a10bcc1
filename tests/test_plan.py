"""The dry run's figures are those of the real step, and it asks for nothing that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from fork_server import Finished, fork
from images import write_images
from published_bases import shallow, stand_in
from repository import ROOT
from sentences import refused
from tiny_classes import SCRATCH
from torch import nn

from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.lpips import Config as LPIPSConfig
from ldm_vae.perceptual.lpips import LPIPS, SMALLEST
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.dry_run import plan
from ldm_vae.training.objective import Objective
from ldm_vae.training.smallest_crop import sides
from ldm_vae.training.state import build_state
from ldm_vae.training.step import TrainingStep
from train import autoencoder as training_program

SETTINGS: dict[str, Any] = {
    "output_dir": "unused",
    "resolution": 32,
    "train_batch_size": 2,
    "model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "losses": {"l1": {"weight": 1.0}, "kl": {"weight": 1e-6}},
    "adversary": {"weight": 0.5},
    "discriminator": {"kind": "patchgan", "width": 8, "layers": 1},
    "data": {"kind": "folder", "path": "nowhere"},
}


def settings(**changes: Any) -> Training:
    return config.validate(Training, SETTINGS | changes, "test")


def test_operations_are_counted_as_the_formulas_say() -> None:
    image = torch.randn(2, 3, 8, 8)
    with Cost() as cost:
        nn.functional.conv2d(image, torch.randn(5, 3, 3, 3), padding=1)
    assert cost.flops == 2 * 2 * 8 * 8 * 5 * 3 * 9
    forward, layer = 2 * 2 * 8 * 8 * 6 * 9, nn.Conv2d(6, 6, 3, padding=1, groups=6)
    with Cost() as cost:
        layer(torch.randn(2, 6, 8, 8, requires_grad=True)).sum().backward()
    assert cost.flops == 3 * forward  # and the two gradients
    upwards = nn.ConvTranspose2d(4, 3, 2, stride=2)
    with Cost() as cost:
        upwards(torch.randn(2, 4, 8, 8, requires_grad=True)).sum().backward()
    assert cost.flops == 3 * 2 * 2 * 8 * 8 * 4 * 3 * 4
    query = torch.randn(2, 1, 16, 4)
    with Cost() as cost:
        nn.functional.scaled_dot_product_attention(query, query, query)
    assert cost.flops == 2 * (2 * 16 * 16 * 4) * 2


def test_memory_is_the_most_that_lives_at_one_time() -> None:
    with Cost() as cost:
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + 1.0  # two at a time
        view = kept[:10]
    assert cost.peak_bytes == 2 * 4000 and cost.bytes == 4000 and len(view) == 10


def test_what_was_there_before_is_not_counted_where_it_is_written_to_or_viewed() -> None:
    """An optimiser's moments, a linear layer's weight: a plan has them elsewhere."""
    before = torch.zeros(1000)
    with Cost() as cost:
        before.add_(1.0)
        view = before.view(10, 100).t()
        torch._foreach_mul_([before], 2.0)
    assert cost.peak_bytes == 0 and view.shape == (100, 10)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_plan_is_what_the_real_step_does(accumulation: int) -> None:
    chosen = settings(gradient_accumulation_steps=accumulation)
    found = plan(chosen)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    network = TrainableAutoencoder(chosen.model.build().train())
    critic = PatchGAN(width=8, layers=1).build()
    optimizers = [chosen.optimizer.build(module.parameters(), 1e-4) for module in (network, critic)]
    step = TrainingStep(
        accelerator, network, Objective({"l1": L1(), "kl": KL()}), accelerator.prepare(optimizers[0]),
        Adversary(AdversaryConfig(weight=0.5)), critic, accelerator.prepare(optimizers[1]),
    )  # fmt: skip
    images, noise = torch.zeros(2, 3, 32, 32), torch.zeros(2, 4, 16, 16)

    def update() -> None:
        for _ in range(accumulation):
            step(images, noise)

    update()
    with Cost() as real:
        update()
    assert found.step_gflop == pytest.approx(real.flops / accumulation / 2 / 1e9, rel=1e-6)
    assert found.bytes["activations and gradients"] == pytest.approx(real.peak_bytes, rel=0.02)
    weights = [parameter for module in (network, critic) for parameter in module.parameters()]
    assert found.bytes["weights"] == sum(4 * parameter.numel() for parameter in weights)
    assert found.bytes["Adam's moments"] == pytest.approx(2 * found.bytes["weights"], rel=0.01)


@pytest.mark.parametrize("kind", ["dc", "asymmetric", "wan"])
def test_every_kind_is_planned(kind: str) -> None:
    """Also one of whose parameters some do not learn."""
    chosen = settings(model=SCRATCH[kind], losses={"l1": {}}, gradient_checkpointing=True)
    found, vae = plan(chosen), build_autoencoder(chosen)
    assert found.parameters["autoencoder"] == sum(one.numel() for one in vae.parameters())
    learns = sum(one.numel() for one in vae.parameters() if one.requires_grad) + found.parameters["discriminator"]
    assert found.bytes["Adam's moments"] == pytest.approx(2 * 4 * learns, rel=0.01)
    assert found.forward_gflop["decoder"] > 0 and found.step_gflop > found.forward_gflop["decoder"]


@pytest.mark.slow
def test_what_losses_look_through_is_counted() -> None:
    found = plan(settings(resolution=64, losses={"l1": {}, "lpips": {"net": "alex"}}))
    network = LPIPSConfig(net="alex").outline().network
    expected = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert found.bytes["networks that losses look through"] == expected > 9e6
    assert "networks that losses look through" not in plan(settings()).bytes


@pytest.mark.slow
def test_a_variable_of_accelerate_does_not_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plan(settings())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert plan(settings()) == expected


@pytest.mark.slow
def test_what_saves_memory_shows_and_what_costs_shows() -> None:
    deep = {"model": SETTINGS["model"] | {"block_out_channels": [8, 8, 16], "layers_per_block": 2}, "resolution": 64}
    plain, saving = plan(settings(**deep)), plan(settings(**deep, gradient_checkpointing=True))
    name = "activations and gradients"
    assert saving.bytes[name] < 0.6 * plain.bytes[name]
    assert 1.2 < saving.step_gflop / plain.step_gflop < 1.4  # one more forward of the autoencoder
    decoder = plan(settings(trainable=["decoder.*", "post_quant_conv.*"]))
    assert decoder.step_gflop < 0.85 * plan(settings()).step_gflop


def test_lpips_in_chunks_is_the_same_loss_in_less_memory() -> None:
    torch.manual_seed(0)
    whole = LPIPSConfig(net="alex").outline()
    chunked = LPIPS(whole.network, SMALLEST["alex"], chunk=1)
    target = torch.rand(4, 3, 64, 64) * 2 - 1
    results = []
    for term in (whole, chunked):
        pixels = (target * 0.5).requires_grad_()
        with Cost() as cost:
            loss = term(pixels, target)
            (gradient,) = torch.autograd.grad(loss, pixels)
        results.append((loss.detach(), gradient, cost.peak_bytes))
    (loss, gradient, peak), (other_loss, other_gradient, other_peak) = results
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_gradient, gradient)
    assert other_peak < 0.5 * peak


@pytest.mark.slow
def test_norms_under_a_gpus_autocast_are_counted_in_fp32() -> None:
    norm, convolution = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
    for precision, after, within in (("no", torch.float32, torch.float32), ("bf16", torch.float32, torch.bfloat16)):
        with gpu_autocast(precision):
            halved = convolution(torch.zeros(1, 4, 2, 2))
            assert halved.dtype == within and norm(halved).dtype == after
    whole, half = (plan(settings(mixed_precision=name)).bytes["activations and gradients"] for name in ("no", "bf16"))
    assert 0.6 * whole < half < 0.95 * whole  # the norms' outputs are a good part of what is held


# --- through the real program -----------------------------------------------------------------------------------------


def dry_run(folder: Path, **changes: Any) -> Finished:
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(folder / "run")} | changes))
    return fork(training_program.main, [str(folder / "config.yaml"), "--dry_run"]).wait()


@pytest.mark.slow
def test_a_dry_run_needs_neither_data_nor_weights(tmp_path: Path) -> None:
    done = dry_run(tmp_path, init_from="some-lab/some-vae", losses={"l1": {}, "lpips": {"net": "vgg"}})
    assert done.returncode == 0, done.stderr
    told = {line[2:].partition(":")[0]: line for line in done.stdout.splitlines() if line.startswith("# ")}
    assert "not found here: nowhere" in told["data"] and "not found here: some-lab/some-vae" in told["init_from"]
    assert "lpips" in told["GFLOP an image"] and "peak about" in told["memory, GB"]
    assert not (tmp_path / "run").exists()
    resolved = yaml.safe_load(done.stdout)  # the plan stands in comments: the output is a config
    assert resolved["losses"]["lpips"]["net"] == "vgg"


@pytest.mark.slow
def test_a_dry_run_tells_of_what_is_there(tmp_path: Path, tiny_vae_folder: Path) -> None:
    images = write_images(tmp_path / "images", 10)
    data = {"kind": "folder", "path": str(images)}
    done = dry_run(tmp_path, init_from=str(tiny_vae_folder), data=data, max_train_images=40)
    assert done.returncode == 0, done.stderr
    assert f"10 images in {images}; an epoch is 5 updates of 2, the run 4 epochs, 20 updates" in done.stdout
    assert "whose shape is `model`" in done.stdout
    wrong = dry_run(tmp_path, init_from=str(tiny_vae_folder), model=SETTINGS["model"] | {"layers_per_block": 2})
    assert wrong.returncode == 2 and "model.layers_per_block: the config says 2" in wrong.stderr
    odd = dry_run(tmp_path, model={"block_out_channels": [8, 12], "norm_num_groups": 8})
    assert odd.returncode == 2 and "expected multiples of norm_num_groups 8, got 12" in odd.stderr


def makes() -> list[Path]:
    """Of the shipped configs one of every make: those that differ in widths and depths alone are planned alike, and
    test_configs.py takes a step of each."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        one = config.load(Training, path)
        terms, critic = (
            sorted(term.kind for term in one.losses.values()),
            one.adversary.weight and one.discriminator.kind,
        )
        start = one.init_from if one.model.kind == "pretrained" else one.init_from is None
        found[repr((one.model.kind, start, terms, critic, sorted(one.perturbations), one.gradient_checkpointing))] = (
            path
        )
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", makes(), ids=lambda path: path.stem)
def test_every_make_of_config_has_a_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(shallow(stand_in(config.load(Training, path), monkeypatch)))
    assert found.step_gflop > 3 * found.forward_gflop["encoder"] and all(found.bytes.values())


@pytest.mark.parametrize(
    ("changes", "field", "crop"),
    [
        ({"discriminator": {"kind": "patchgan", "width": 8, "layers": 4}}, "discriminator", "32 x 32"),
        ({"perturbations": {"eq": {"scales": [0.25, 1.0]}}}, "discriminator", "8 x 8"),
        ({"buckets": {"shapes": [[6, 64], [32, 32]]}}, "discriminator", "6 x 64"),
        (
            {"adversary": {"weight": 0.0}, "losses": {"l1": {}, "lpips": {"net": "alex"}}, "resolution": 16},
            "lpips",
            "16",
        ),
    ],
)
def test_what_has_no_room_in_the_smallest_crop_is_refused_before_the_first_step(
    changes: dict[str, Any], field: str, crop: str
) -> None:
    deep = settings(**{"discriminator": {"kind": "patchgan", "width": 8, "layers": 2}} | changes)
    for start in (lambda: plan(deep), lambda: build_state(deep, Accelerator(cpu=True), build_autoencoder(deep))):
        with refused(UsageError, field) as refusal:
            start()
        assert crop in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_smallest_crop_is_one_that_a_step_sees() -> None:
    assert sides(settings(), 2) == (32, 32)
    assert sides(settings(perturbations={"eq": {"scales": [0.3]}}), 4) == (8, 8)  # 2.4 latents are 2
    assert sides(settings(buckets={"shapes": [[64, 16], [32, 32]]}), 2) == (64, 16)
