"""The training step against its textbook form: same adaptive weight, same gradients, and nothing leaks.

The reference is latent-diffusion's: the whole graph kept, two `autograd.grad(retain_graph=True)` at the last layer, one
backward of the summed loss. Everything in fp64, so that equality is equality.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from sentences import refused
from tiny_classes import tiny
from torch import nn

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses import TermConfig
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep


class Perceptual(nn.Module):
    """Stands in for LPIPS: features of a fixed random network, compared."""

    domain = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double().requires_grad_(False)

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (self.features(pixels) - self.features(target)).square().mean()


class PerceptualConfig(TermConfig):
    kind: str = "perceptual"

    def build(self) -> Perceptual:
        return Perceptual()


class Scale(nn.Module):
    """A term with a parameter of its own, as a learned log-variance has."""

    domain = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, pixels: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pixels - target).square().mean() * torch.exp(-self.logvar) + self.logvar


class ScaleConfig(TermConfig):
    kind: str = "scale"

    def build(self) -> Scale:
        return Scale()


class FrozenOptimizer(torch.optim.SGD):
    """Leaves weights and gradients as they are, so that a test can look at the gradients."""

    def step(self, closure=None):
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        return None


FRAMES, CHOSEN = 9, 2  # of a clip, and those of them that its perceptual term sees


def build(
    *,
    start_images: int = 0,
    accumulation: int = 1,
    adaptive: bool = True,
    loss: str = "hinge",
    dimensions: int | None = None,
) -> TrainingStep:
    """dimensions: of the discriminator of clips; None trains on images."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    if dimensions is not None:
        vae = tiny("AutoencoderKLWan").requires_grad_(True).train()
    model = TrainableAutoencoder(vae.double())
    terms = {"l1": L1(), "perceptual": PerceptualConfig(weight=0.7), "scale": ScaleConfig(), "kl": KL(weight=1e-2)}
    if dimensions is not None:
        of_clips = {"perceptual": PerceptualConfig(weight=0.7, frames=CHOSEN), "time": TemporalDifference(weight=3.0)}
        terms = terms | of_clips
    objective = Objective(terms)
    discriminator = PatchGAN(width=8, layers=1, dimensions=dimensions or 2).build().double()
    adversary = Adversary(AdversaryConfig(weight=0.5, adaptive=adaptive, start_images=start_images, loss=loss))
    return TrainingStep(
        accelerator,
        accelerator.prepare(model),
        objective,
        accelerator.prepare(FrozenOptimizer([*model.parameters(), *objective.parameters()], lr=1.0)),
        adversary,
        accelerator.prepare(discriminator),
        accelerator.prepare(FrozenOptimizer(discriminator.parameters(), lr=1.0)),
    )


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 32, 32, generator=draw, dtype=torch.float64) * 2 - 1
    return images, torch.randn(2, 4, 16, 16, generator=draw, dtype=torch.float64)


def clips(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, frames, 16, 16, generator=draw, dtype=torch.float64) * 2 - 1
    return images, torch.randn(2, 17, (frames + 3) // 4, 2, 2, generator=draw, dtype=torch.float64)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def by_frame(images: torch.Tensor) -> torch.Tensor:
    """Images, or the frames [B*T, C, H, W] of clips."""
    return torch.stack([frame for clip in images for frame in clip.unbind(1)]) if images.ndim == 5 else images


def by_clip(frames: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([torch.stack(tuple(clip), dim=1) for clip in frames.split(count)])


def of_clips(objective: Objective, pixels: torch.Tensor, clips: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The terms on pixels, written out: `CHOSEN` frames of each clip, from a start that the last noise decides."""
    count, terms = clips.shape[2], objective.terms
    target, chosen, changes = by_frame(clips), [], []
    for clip in range(len(clips)):
        start = torch.special.ndtr(noise[clip, -1, 0, 0, 0]).item()
        places = [int((start + step) * count / CHOSEN) for step in range(CHOSEN)] if count > 1 else [0]
        chosen += [clip * count + place for place in places]
        for frame in range(clip * count, clip * count + count - 1):
            changes.append(((pixels[frame + 1] - pixels[frame]) - (target[frame + 1] - target[frame])).abs())
    total = (pixels - target).abs().mean() + terms["scale"](pixels, target)
    total = total + 0.7 * terms["perceptual"](pixels[chosen], target[chosen])
    return total + 3.0 * torch.stack(changes).mean() if changes else total


def textbook(step: TrainingStep, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, dict, dict]:
    """latent-diffusion's step on the same networks: (weight, generator gradients, discriminator gradients)."""
    model, objective, discriminator = step.model, step.objective, step.discriminator
    for module in (model, objective, discriminator):
        module.zero_grad()
    r = model(images, noise)
    rec = objective.pixel_terms(r.pixels, r)[0] if images.ndim == 4 else of_clips(objective, r.pixels, images, noise)
    rate, _ = objective.latent_terms(r)
    judged = {2: lambda one: one, 3: lambda one: by_clip(one, images.shape[2])}[images.ndim - 2]
    if discriminator.domain == "pixels":
        judged = by_frame
    fake = step.adversary.generator_loss(discriminator(judged(r.pixels)))
    last = model.vae.decoder.conv_out.weight
    g_rec = torch.autograd.grad(rec, last, retain_graph=True)[0].norm()
    g_adv = torch.autograd.grad(fake, last, retain_graph=True)[0].norm()
    weight = 0.5 * (g_rec / (g_adv + 1e-4)).clamp(max=1e4 / r.pixels[0].numel()).detach()
    (rec + rate + weight * fake).backward()
    generator = gradients(model) | gradients(objective)
    discriminator.zero_grad()
    real, fake = discriminator(judged(by_frame(images))), discriminator(judged(r.pixels.detach()))
    step.adversary.discriminator_loss(real, fake).backward()
    return weight, generator, gradients(discriminator)


@pytest.mark.parametrize(
    ("loss", "frames", "dimensions"),
    [
        *((loss, None, None) for loss in ("hinge", "vanilla", "non_saturating")),
        ("hinge", FRAMES, 2),
        ("hinge", FRAMES, 3),
        ("hinge", 1, 3),  # images among clips
    ],
)
def test_the_step_equals_its_textbook_form(loss: str, frames: int | None, dimensions: int | None) -> None:
    step = build(loss=loss, dimensions=dimensions)
    images, noise = batch() if frames is None else clips(frames)
    weight, generator, discriminator = textbook(step, images, noise)
    for module in (step.model, step.objective, step.discriminator):
        module.zero_grad()
    logs = step(images, noise)
    assert logs["adversary/weight"].item() == pytest.approx(weight.item(), rel=1e-10)
    ours = gradients(step.model) | gradients(step.objective)
    assert ours.keys() == generator.keys()
    for name, expected in generator.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-14, msg=name)
        assert frames is None or float((ours[name] - expected).norm()) <= 1e-10 * max(float(expected.norm()), 1e-4)
    if frames == FRAMES:  # all of a clip has a part
        assert logs["loss/time"] > 0 and len(generator) == len(list(step.model.parameters())) + 1
    for name, expected in discriminator.items():
        torch.testing.assert_close(gradients(step.discriminator)[name], expected, rtol=1e-9, atol=1e-14, msg=name)


def test_every_term_reaches_what_it_should() -> None:
    images, noise = batch()
    for name, reaches_decoder in (("perceptual", True), ("l1", True), ("kl", False)):
        step = build(start_images=10**9)
        step.objective = Objective({"l1": L1(weight=0.0), name: step.objective.configs[name]})
        step(images, noise)
        vae = step.model.vae
        assert vae.encoder.conv_in.weight.grad.abs().sum() > 0, name
        assert bool(vae.decoder.conv_out.weight.grad.abs().sum() > 0) == reaches_decoder, name


def test_an_objective_without_a_pixel_term_is_refused() -> None:
    with refused(UsageError, "losses"):
        Objective({"kl": KL()})


def test_no_gradient_leaks_between_the_two_networks() -> None:
    images, noise = batch()
    # the generator's side alone must not touch the discriminator
    step = build()
    reconstruction = step.model(images, noise)
    step._autoencoder(reconstruction, 0)
    assert not gradients(step.discriminator)
    # the discriminator's side alone must not touch the autoencoder
    step = build()
    step._discriminator(step.model(images, noise), 0)
    assert not gradients(step.model)
    assert gradients(step.discriminator)


def test_the_adversary_costs_nothing_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build(start_images=100)

    def never(*_: object) -> None:
        raise AssertionError("the discriminator was called before its start")

    monkeypatch.setattr(step.discriminator, "forward", never)
    logs = step(*batch(), images_seen=99)
    assert "adversary/weight" not in logs and "adversary/discriminator" not in logs
    monkeypatch.undo()
    assert "adversary/weight" in step(*batch(), images_seen=100)


def test_the_discriminator_warms_up_unseen() -> None:
    step = build()
    step.adversary = Adversary(AdversaryConfig(weight=0.5, start_images=100, warmup_images=40))
    logs = step(*batch(), images_seen=60)
    assert "adversary/discriminator" in logs and "adversary/weight" not in logs
    assert "adversary/discriminator" not in step(*batch(), images_seen=59)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    first, second = batch(1), batch(2)
    alone = []
    for micro in (first, second):
        step = build()
        step(*micro)
        alone.append(gradients(step.model) | gradients(step.objective) | gradients(step.discriminator))
    step = build(accumulation=2)
    step(*first)
    assert not step.accelerator.sync_gradients
    step(*second)
    assert step.accelerator.sync_gradients
    both = gradients(step.model) | gradients(step.objective) | gradients(step.discriminator)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-9, atol=1e-14, msg=name)


def test_a_fixed_weight_is_taken_as_it_is() -> None:
    assert build(adaptive=False)(*batch())["adversary/weight"].item() == 0.5


def test_a_nan_update_is_left_out_when_it_is_to_be_skipped() -> None:
    images, noise = batch()
    step = build(start_images=10**9)
    step.optimizer = step.accelerator.prepare(
        torch.optim.Adam([*step.model.parameters(), *step.objective.parameters()], lr=0.1)
    )
    step.skip_nan = True
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    logs = step(images * torch.nan, noise)
    assert logs["skipped/autoencoder"] == 1
    assert all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
    assert step(images, noise)["skipped/autoencoder"] == 0
    assert not all(torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in step.model.parameters())
