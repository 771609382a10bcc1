"""State that moves per update: A micro-batches of B images leave what one batch of A * B leaves, in
fp64, for every part that has a state. The adaptive weight alone is each micro-batch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ldm_vae.autoencoder.codebooks import put_beside
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core import rng
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.losses.code_entropy import Config as CodeEntropy
from ldm_vae.losses.code_kl import Config as CodeKL
from ldm_vae.losses.codebook import Config as Codebook
from ldm_vae.losses.commitment import Config as Commitment
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.kl_capacity import Config as Capacity
from ldm_vae.losses.kl_free_bits import Config as FreeBits
from ldm_vae.losses.kl_target import Config as KLTarget
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.models.vq import Config as VQConfig
from ldm_vae.perturbations.eq import Config as EQ
from ldm_vae.quantizers.lfq import Config as LFQ
from ldm_vae.quantizers.residual import Config as Residual
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

UPDATE, UPDATES, SIDE, FRAMES = 4, 3, 16, 3  # images of an update, updates, px, frames of a clip


def build(
    accumulation: int,
    terms: dict[str, Any] | None = None,
    quantizer: dict[str, Any] | None = None,
    norm: str = "group",
    dimensions: int = 2,
    beside: Any = None,
    perturbations: tuple[Any, ...] = (),
    max_grad_norm: float | None = None,
    learning_rate: float = 0.1,
    **adversary: Any,
) -> TrainingStep:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    shape: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    codes = {"num_vq_embeddings": 24, "latent_channels": 3, "quantizer": quantizer}
    config = AutoencoderConfig(**shape) if quantizer is None else VQConfig(**shape, **codes)
    vae = config.build().double()
    if beside is not None:
        put_beside(vae, beside.beside(4).double())
    bottleneck = (beside.build if beside else config.bottleneck)(vae)
    network = TrainableAutoencoder(vae, bottleneck, [part.build(0) for part in perturbations])
    objective = Objective({"l1": L1(), **(terms or {})}).double()
    critic = PatchGAN(width=8, layers=1, norm=norm, dimensions=dimensions).build().double()
    optimizers = [
        accelerator.prepare(torch.optim.SGD(trainable_parameters(modules), lr=learning_rate))
        for modules in ((network, objective), (critic,))
    ]
    game = Adversary(AdversaryConfig(weight=0.5, adaptive=False, **adversary)).double()
    return TrainingStep(
        accelerator, accelerator.prepare(network), objective, optimizers[0], game, accelerator.prepare(critic),
        optimizers[1], max_grad_norm,
    )  # fmt: skip


def batch(step: TrainingStep, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, or clips where there is a term of those."""
    positions, size = range(start, start + count), (FRAMES, SIDE, SIDE)
    size = size if "time" in step.objective.terms else size[1:]
    images = rng.normal(1, "images", positions, (3, *size)).double().tanh()
    brightness = torch.tensor([0.2 + position % UPDATE / UPDATE for position in positions])
    images *= brightness.view(-1, 1, *[1] * len(size))
    return images, posterior_noise(2, positions, step.model.noise_shape(*size)).double()


def run(step: TrainingStep, updates: int = UPDATES, first: int = 0) -> dict[str, torch.Tensor]:
    """Everything that the run holds after so many updates, and what the last of them logged."""
    parts = step.accelerator.gradient_accumulation_steps
    logs = {}
    for seen in range(first * UPDATE, (first + updates) * UPDATE, UPDATE):
        for start in range(seen, seen + UPDATE, UPDATE // parts):
            logs = step(*batch(step, start, UPDATE // parts), seen)
    logs = {f"log.{name}": value for name, value in logs.items() if name.startswith(("codes", "gradient_norm"))}
    return state(step) | logs


def state(step: TrainingStep) -> dict[str, torch.Tensor]:
    modules = {"model": step.model, "objective": step.objective, "critic": step.discriminator, "game": step.adversary}
    found = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            inner = value if isinstance(value, dict) else {"": value}
            found |= {
                f"{prefix}.{name}.{key}": torch.as_tensor(entry) for key, entry in inner.items() if entry is not None
            }
    return {name: value.detach().clone() for name, value in found.items()}


OF_CLIPS = {"time": TemporalDifference(), "some": L2(frames=2), "kl": KL()}
REGULARISED = {"r1_weight": 50.0, "r1_every": 2, "lecam_weight": 1.0, "lecam_halflife_images": 8}
RESIDUAL = {"codebooks": 3, "codes": 16, "dropout": 0.5, "decay": 0.9, "restart_images": 2 * UPDATE}
VQ = {"kind": "vq", "decay": 0.9, "restart_images": 2 * UPDATE}
# what is set, and a piece of the state that must have moved for the comparison to say something
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "r1": ({"r1_weight": 50.0, "r1_every": 2}, "critic"),
    "lecam": ({"lecam_weight": 1.0, "lecam_halflife_images": 8}, "game.averages"),
    "spectral norm": ({"norm": "spectral"}, "critic"),
    "clipping": ({"max_grad_norm": 1e-2}, "model"),
    "codebook": ({"quantizer": VQ, "terms": {"commitment": Commitment()}}, "model.bottleneck.statistics.sums"),
    "cosine": ({"quantizer": VQ | {"distance": "cosine"}, "terms": {"commitment": Commitment()}}, "model.bottleneck"),
    "learned codebook": (
        {"quantizer": VQ | {"codebook": "learned", "distance": "cosine"}, "terms": {"codebook": Codebook()}},
        "model.vae.quantize",
    ),
    "fsq": ({"quantizer": {"kind": "fsq", "levels": [4, 3, 2]}}, "model"),
    "gumbel": ({"quantizer": {"kind": "gumbel"}, "terms": {"rate": CodeKL(weight=0.01)}}, "model"),
    "lfq": ({"beside": LFQ(), "terms": {"entropy": CodeEntropy()}}, "objective.terms.entropy.used"),
    "residual": ({"beside": Residual(**RESIDUAL), "terms": {"commitment": Commitment()}}, "model.bottleneck.levels.2"),
    "learned residual": (
        {
            "beside": Residual(**RESIDUAL | {"codebook": "learned", "code_dim": 2, "distance": "cosine"}),
            "terms": {"commitment": Commitment(), "codebook": Codebook()},
        },
        "model.vae.quantizer.into",
    ),
    "kl_target": ({"terms": {"t": KLTarget(nats_per_pixel=0.1, integral_images=10)}}, "objective.terms.t.log_beta"),
    "kl_free_bits": ({"terms": {"free": FreeBits(bits=9)}}, "objective.terms.free.rates"),
    "free bits of a dimension": ({"terms": {"free": FreeBits(bits=0.3, per="dimension")}}, "objective.terms.free"),
    "kl_capacity": ({"terms": {"c": Capacity(weight=1.0, nats=30, images=20)}}, "objective.terms.c.rate"),
    "gaussian_nll": ({"terms": {"nll": GaussianNLL(), "kl": KL()}}, "objective.terms.nll.logvar"),
    "clips": ({"terms": OF_CLIPS, "norm": "spectral", "dimensions": 3} | REGULARISED, "game.averages"),
    "frames": ({"terms": OF_CLIPS, "norm": "spectral"} | REGULARISED, "game.averages"),
    "eq": ({"perturbations": (EQ(scales=(0.5, 1.0)),), "terms": {"kl": KL()}}, "model"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_micro_batches_leave_what_one_batch_leaves(part: str) -> None:
    settings, moved = PARTS[part]
    whole, several = build(1, **settings), build(2, **settings)
    before, first = state(whole), 0
    if part in (
        "free bits of a dimension",
        "lfq",
    ):  # in its first update each micro-batch decides alone, as is documented
        first = 1
        run(whole, 1)
        for ours, theirs in ((several.model, whole.model), (several.objective, whole.objective),
                             (several.discriminator, whole.discriminator)):  # fmt: skip
            ours.load_state_dict(theirs.state_dict())
    one, other = run(whole, UPDATES - first, first), run(several, UPDATES - first, first)
    assert any(
        name not in before or not torch.equal(before[name], one[name]) for name in one if name.startswith(moved)
    ), "nothing has moved: the comparison says nothing"
    assert other.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("accumulation", "every", "of_clips"),
    [
        *((*one, {}) for one in [(1, 3), (2, 2), (3, 2), (2, 4)]),
        *((2, 2, {"terms": OF_CLIPS, "dimensions": dimensions}) for dimensions in (2, 3)),
    ],
)
def test_r1_is_paid_in_one_of_so_many_updates(accumulation: int, every: int, of_clips: dict[str, Any]) -> None:
    """By all micro-batches of an update or by none, and on the average gamma / 2 times the squared gradient."""
    step = build(accumulation, r1_weight=1.0, r1_every=every, learning_rate=0.0, **of_clips)
    paid = []
    for update in range(2 * every):
        for part in range(accumulation):
            images, noise = batch(step, part, 1)
            paid.append(step(images, noise, update * accumulation).get("adversary/r1"))
    updates = [paid[start : start + accumulation] for start in range(0, len(paid), accumulation)]
    assert [len([r1 for r1 in update if r1 is not None]) for update in updates] == (
        [accumulation] + [0] * (every - 1)
    ) * 2
    images, _ = batch(step, 0, accumulation)
    if of_clips.get("dimensions") == 2:  # each frame is an image to it
        images = frames_of(images)
    images.requires_grad_()
    logits = step.discriminator(images)
    (gradient,) = torch.autograd.grad(logits.sum() / logits[0].numel(), images)
    mean = sum(float(r1) for r1 in paid if r1 is not None) / len(paid)
    assert mean == pytest.approx(0.5 * gradient.square().flatten(1).sum(dim=1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_lecam_counts_clips(dimensions: int) -> None:
    """Its half-life is of clips, whether their frames are judged one by one or not."""
    step = build(1, terms=OF_CLIPS, dimensions=dimensions, lecam_weight=1.0)
    step.adversary.after_update = lambda: None
    step(*batch(step, 0, UPDATE), 0)
    assert step.adversary.images == UPDATE


STATEFUL: dict[str, dict[str, Any]] = {
    "lecam": {"lecam_weight": 1.0},
    "codebook": PARTS["codebook"][0],
    "kl_target": PARTS["kl_target"][0],
    "kl_free_bits": PARTS["kl_free_bits"][0],
    "kl_capacity": PARTS["kl_capacity"][0],
    "spectral norm": PARTS["spectral norm"][0],
}  # fmt: skip


@pytest.mark.parametrize("part", STATEFUL)
def test_an_update_that_is_left_out_leaves_all_of_it_out(part: str) -> None:
    """NaN in one micro-batch: the other's statistics do not move anything either, and the next update is as ever."""
    step = build(2, **STATEFUL[part])
    step.skip_nan = True
    run(step, 2)
    before = state(step)
    for number in range(2):
        images, noise = batch(step, number, UPDATE // 2)
        step(images * (torch.nan if number == 0 else 1.0), noise, 2 * UPDATE)
    after = state(step)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    undisturbed = build(2, **STATEFUL[part])
    run(undisturbed, 2)
    run(undisturbed, 1, first=3), run(step, 1, first=3)
    ours, theirs = state(step), state(undisturbed)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and value.isfinite().all(), name


@pytest.mark.parametrize("part", STATEFUL)
def test_nothing_of_an_update_is_in_the_state(part: str) -> None:
    """A checkpoint holds what was moved; resumed from it the run goes on alike."""
    settings = STATEFUL[part]
    step, resumed = build(2, **settings), build(2, **settings)
    run(step, 3)
    for ours, theirs in (
        (resumed.model, step.model), (resumed.objective, step.objective), (resumed.adversary, step.adversary),
        (resumed.discriminator, step.discriminator),
    ):  # fmt: skip
        ours.load_state_dict(theirs.state_dict())
    run(step, 2, first=3), run(resumed, 2, first=3)
    ours, theirs = state(resumed), state(step)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("config", [FreeBits(), Capacity()], ids=["kl_free_bits", "kl_capacity"])
def test_a_checkpoint_from_before_a_term_had_a_state_is_loaded(config: Any) -> None:
    term = config.build()
    old = {name: value for name, value in term.state_dict().items() if "_extra_state" not in name}
    assert old.keys() < term.state_dict().keys()
    Objective({"l1": L1(), "term": config}).load_state_dict({f"terms.term.{name}": old[name] for name in old})


class Scaled:
    """torch's scaler as Accelerate has it on a GPU, whose scale grows after each step that was taken."""

    def __init__(self, step: TrainingStep, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        accelerator = step.accelerator
        accelerator.scaler, accelerator.native_amp = self.scaler, True
        monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
        for optimizer in (step.optimizer, step.discriminator_optimizer):
            inner, moves = optimizer.optimizer, type(optimizer.optimizer).step

            def patched(*args: Any, of: Any = optimizer, inner: Any = inner, moves: Any = moves, **kwargs: Any) -> Any:
                of._accelerate_step_called = True
                return moves(inner, *args, **kwargs)

            optimizer.scaler, optimizer._accelerate_step_called = self.scaler, False
            optimizer._optimizer_original_step_method = inner.step
            optimizer._optimizer_patched_step_method = patched


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_scale_changes_no_update(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimisers share the scaler: each is unscaled once, and gradients of earlier micro-batches follow a scale
    that has moved in between."""
    settings: dict[str, Any] = {"max_grad_norm": 0.1, "r1_weight": 1.0, "r1_every": 2}
    plain = run(build(accumulation, **settings), 3)
    step = build(accumulation, **settings)
    scaled = Scaled(step, monkeypatch)
    found = run(step, 3)
    assert scaled.scaler.get_scale() == 2.0**16  # six steps
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_that_the_scaler_leaves_out_logs_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build(1, lecam_weight=1.0)
    Scaled(step, monkeypatch)
    images, noise = batch(step, 0, 4)
    weight = next(step.model.vae.encoder.parameters())
    hook = weight.register_hook(lambda gradient: gradient * torch.inf)
    before = state(step)
    logs = step(images, noise)
    hook.remove()
    assert "gradient_norm/autoencoder" not in logs and "gradient_norm/discriminator" in logs
    after = state(step)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model"))
    assert "gradient_norm/autoencoder" in step(images, noise)
