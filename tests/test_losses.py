"""The contract of every term in ldm_vae/losses: a finite fp32 scalar, the same under bf16 autocast, its gradient where
it belongs and nowhere else, and the value of the paper's formula (or of another package)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sentences import refused
from tiny_networks import TinyLPIPS, network
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.signals import clips_of
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.losses import Schedule
from ldm_vae.losses.alignment import Alignment
from ldm_vae.losses.drift import Drift
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.kl_capacity import Config as Capacity
from ldm_vae.losses.kl_free_bits import Config as FreeBits
from ldm_vae.losses.kl_target import Config as KLTarget
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.perceptual.lpips import LPIPS
from ldm_vae.perceptual.teacher import teacher
from ldm_vae.training.objective import Objective, rate

OF_SOUNDS = ("multi_resolution_stft", "multi_scale_mel")  # tests/test_losses_sounds.py has theirs
TERMS = [kind for kind in config.options("ldm_vae.losses") if kind not in OF_SOUNDS]
KWARGS = {"latent_range": {"limit": 0.1}, "activation_range": {"limit": 0.1}, "gaussian_nll": {"levels": 256}}


class Stem(nn.Module):
    """Stands in for VGG, or for DINOv2: a few random features with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images / 127.5 - 1)


def build(kind: str, vae_folder: str = "") -> nn.Module:
    """The term with the smallest networks, as its Config builds it."""
    torch.manual_seed(1)
    if kind == "lpips":
        return LPIPS(TinyLPIPS(), 16)
    if kind == "alignment":
        return Alignment(Stem(), 4, 8, 0.1, 0.05)
    if kind == "drift":
        return Drift(vae_folder, "raw", teacher(vae_folder))
    module = __import__(f"ldm_vae.losses.{kind}", fromlist=["Config"])
    return module.Config(**KWARGS.get(kind, {})).build()


def images(count: int = 2, channels: int = 3, size: tuple[int, ...] = (32, 32)) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.rand(count, channels, *size, generator=draw) * 2 - 1


def forward(model: TrainableAutoencoder, images_seen: int = 0, size: tuple[int, ...] = (32, 32)) -> Reconstruction:
    noise = torch.randn(2, *model.noise_shape(*size), generator=torch.Generator().manual_seed(4))
    return model(images(channels=3 + model.alpha, size=size), noise, images_seen)


def reaches(model: TrainableAutoencoder, objective: Objective, size: tuple[int, ...] = (32, 32)) -> set[str]:
    """The parts that a backward of the objective moves."""
    r = forward(model, size=size)
    pixels = objective.pixel_terms(r.pixels, r)[0]
    (pixels + objective.latent_terms(r)[0]).backward()
    parts = {"encoder": model.vae.encoder, "decoder": model.vae.decoder, "own": objective}
    if hasattr(model.vae, "quantize"):
        parts["codebook"] = model.vae.quantize
    moved = {name for name, part in parts.items()
             if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())}  # fmt: skip
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*model.parameters(), *objective.parameters()])
    return moved


# kind => what its gradient reaches; everything else stays untouched
REACHES = {
    "alpha": {"encoder", "decoder"},
    "l1": {"encoder", "decoder"},
    "l2": {"encoder", "decoder"},
    "charbonnier": {"encoder", "decoder"},
    "lpips": {"encoder", "decoder"},
    "ssim": {"encoder", "decoder"},
    "focal_frequency": {"encoder", "decoder"},
    "haar": {"encoder", "decoder"},
    "temporal_difference": {"encoder", "decoder"},
    "gaussian_nll": {"encoder", "decoder", "own"},
    "kl": {"encoder"},
    "kl_free_bits": {"encoder"},
    "kl_capacity": {"encoder"},
    "kl_delta": {"encoder"},
    "kl_target": {"encoder"},
    "latent_range": {"encoder"},
    "activation_range": {"encoder", "decoder"},
    "drift": {"encoder"},
    "alignment": {"encoder", "own"},
    "commitment": {"encoder"},
    "codebook": {"codebook"},
    "code_kl": {"encoder", "codebook"},
    "code_entropy": {"encoder"},
}


@pytest.fixture
def nothing() -> L1:
    """An objective wants a term on pixels; this one moves nothing."""
    return L1(weight=0.0)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (kind, size)
        for kind in TERMS
        for size in ((32, 32), (3, 32, 32))
        if kind != "temporal_difference" or len(size) > 2
    ],
    ids=lambda one: one if isinstance(one, str) else "image" if len(one) == 2 else "clip",
)
def test_a_term_keeps_the_contract(kind: str, size: tuple[int, ...], tiny_vae_folder: object, nothing: L1) -> None:
    term = build(kind, str(tiny_vae_folder))
    codes = getattr(term, "needs", "posterior") == "codes"
    quantizer = {"code_kl": "gumbel", "code_entropy": "lfq"}.get(kind, "vq")
    model = network(codes, quantizer, term.domain == "alpha")
    objective = Objective({"l1": nothing})
    objective.terms = nn.ModuleDict({"l1": nothing.build(), kind: term})
    objective.configs[kind] = L1(weight=1.0)
    objective.attach(model)

    if len(size) > 2 and kind == "alignment":
        with refused(UsageError, "losses.alignment"):
            term(forward(model, size=size))
        return

    def value(r: Reconstruction) -> torch.Tensor:
        both = [clips_of(one, 3) if term.domain == "clips" else one for one in (r.pixels, r.target)]
        return term(r) if term.domain == "latents" else term(*both)

    found = value(forward(model, size=size))
    assert found.shape == () and found.isfinite() and found.dtype == torch.float32
    assert found.item() != 0.0, "a term that is 0 here tests nothing"
    # autocast inside a step: the network computes in bf16, the term in fp32
    r = forward(model, size=size)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value(r)
    assert inside.dtype == torch.float32
    expected = (value(forward(model, size=size)) if kind == "kl_target" else found).item()
    # a projection to features is a convolution, which autocast may round
    assert inside.item() == pytest.approx(expected, rel=2e-2 if kind in ("kl_target", "activation_range") else 1e-5)
    assert reaches(model, objective, size) == REACHES[kind]


def test_every_term_has_a_row_above() -> None:
    assert set(TERMS) == set(REACHES)


# --- values -----------------------------------------------------------------------------------------------------------


def test_charbonnier_is_its_formula() -> None:
    a, b = torch.tensor([0.0, 0.5]), torch.tensor([0.0, -0.5])
    term = config.validate(type(L1()), {"kind": "l1"}, "").build()
    from ldm_vae.losses.charbonnier import Config as Charbonnier

    rounded = Charbonnier(epsilon=1e-3).build()
    assert rounded(a, a).item() == pytest.approx(0.0, abs=1e-9)
    assert rounded(a, b).item() == pytest.approx((math.sqrt(1 + 1e-6) + 1e-3) / 2 - 1e-3, rel=1e-6)
    assert rounded(a, b).item() == pytest.approx(term(a, b).item(), rel=2e-3)


def test_gaussian_likelihood_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, target = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, 4, generator=draw)
    term = GaussianNLL(logvar=-1.0).build()
    expected = -Normal(pixels, math.exp(-0.5)).log_prob(target).mean()
    torch.testing.assert_close(term(pixels, target), expected)
    term = GaussianNLL().build()
    optimizer = torch.optim.Adam(term.parameters(), lr=0.05)
    for _ in range(300):  # the best variance is the mean squared error (Rybkin et al. 2021, eq. 5)
        optimizer.zero_grad()
        term(pixels, target).backward()
        optimizer.step()
    assert term.logvar.exp().item() == pytest.approx((pixels - target).square().mean().item(), rel=1e-3)


def test_the_likelihood_of_levels_is_that_of_a_distribution() -> None:
    levels, sigma = 17, 0.2
    term = GaussianNLL(logvar=2 * math.log(sigma), levels=levels).build().double()
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean in (-1.3, -0.4, 0.97):
        nats = torch.stack([term(torch.tensor([mean], dtype=torch.float64), value[None]) for value in values])
        assert torch.exp(-nats).sum().item() == pytest.approx(1.0, abs=1e-9)
        middle = values[5].item()
        expected = stats.norm.cdf(middle + 1 / 16, mean, sigma) - stats.norm.cdf(middle - 1 / 16, mean, sigma)
        assert nats[5].item() == pytest.approx(-math.log(expected), rel=1e-6)
    # far out in the tail: no mass in fp32, still a number and a gradient
    far = torch.tensor([1.0], requires_grad=True)
    nll = GaussianNLL(logvar=2 * math.log(0.02), levels=256).build()(far, torch.tensor([-0.5]))
    nll.backward()
    assert nll.isfinite() and far.grad.item() > 0


def test_the_rate_is_torchs_and_monte_carlos() -> None:
    r = forward(network(codes=False))
    q = Normal(r.moments.mean, torch.exp(0.5 * r.moments.logvar))
    expected = kl_divergence(q, Normal(0.0, 1.0)).sum() / r.images.numel()
    torch.testing.assert_close(KL().build()(r), expected)
    one = Normal(torch.tensor(0.7), torch.tensor(0.3))
    density = lambda z: stats.norm.pdf(z, 0.7, 0.3) * (stats.norm.logpdf(z, 0.7, 0.3) - stats.norm.logpdf(z))  # noqa: E731
    assert integrate.quad(density, -2, 4)[0] == pytest.approx(kl_divergence(one, Normal(0.0, 1.0)).item(), rel=1e-5)


def test_free_bits_put_a_floor_under_each_channel() -> None:
    r = forward(network(codes=False))
    nats = r.moments.kl().mean(dim=0).detach().numpy()
    for per, groups in (("channel", nats.sum(axis=(1, 2))), ("dimension", nats)):
        floor = float(np.median(groups))
        found = FreeBits(bits=floor / math.log(2), per=per).build()(r).item()
        assert found == pytest.approx(np.maximum(groups, floor).sum() / (3 * 32 * 32), rel=1e-5)
    # a floor above all of them: nothing pulls
    high = FreeBits(bits=1e6).build()(r)
    assert torch.autograd.grad(high, r.moments.mean, retain_graph=True, allow_unused=True)[0].abs().sum() == 0
    assert FreeBits(bits=0.0).build()(r).item() == pytest.approx(KL().build()(r).item(), rel=1e-5)


def test_capacity_rises_and_pulls_from_both_sides() -> None:
    model = network(codes=False)
    term = Capacity(nats=1e6, images=100).build()
    start, half = forward(model, images_seen=0), forward(model, images_seen=50)
    nats = (start.moments.kl().sum() / 2).item()
    assert term(start).item() == pytest.approx(nats / (3 * 32 * 32), rel=1e-5)
    assert term(half).item() == pytest.approx((5e5 - nats) / (3 * 32 * 32), rel=1e-5)


def test_the_controller_holds_the_rate() -> None:
    """A plant whose rate falls with beta as a VAE's does: KL = a / beta, with noise; the controller finds beta."""
    term = KLTarget(nats_per_pixel=0.2, beta=1e-6, integral_images=500).build()
    draw = np.random.default_rng(0)
    held = []
    for step in range(600):
        seen = 8 * step
        level = 3e-4 / term.log_beta.exp().item() * math.exp(0.1 * draw.standard_normal())
        term._control(torch.tensor(level), seen)
        held.append(level)
    assert np.mean(held[-100:]) == pytest.approx(0.2, rel=0.05)
    assert term.log_beta.exp().item() == pytest.approx(3e-4 / 0.2, rel=0.3)
    resumed = KLTarget(nats_per_pixel=0.2, beta=1e-6, integral_images=500).build()
    resumed.load_state_dict(term.state_dict())
    for one in (term, resumed):
        one._control(torch.tensor(0.3), 4808)
    assert torch.equal(term.log_beta, resumed.log_beta) and term.last_error == resumed.last_error


def test_schedules_count_images() -> None:
    linear = Schedule(images=100, start_images=50)
    assert [linear.factor(n) for n in (0, 50, 100, 150, 900)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    cyclic = Schedule(kind="cyclic", images=100, rise=0.5)
    assert [cyclic.factor(n) for n in (0, 25, 50, 99, 100, 125)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    assert Schedule(kind="cosine", images=100).factor(50) == pytest.approx(0.5)
    assert KL(weight=0.2, schedule={"images": 100}).weight_at(25) == pytest.approx(0.05)
    _, logs = Objective({"l1": L1(), "kl": KL(weight=0.2, schedule={"images": 100})}).latent_terms(
        forward(network(codes=False)), 25
    )
    assert logs["weight/kl"].item() == pytest.approx(0.05)


def test_drift_is_in_units_of_the_teachers_latents(tiny_vae_folder: object) -> None:
    model = network(codes=False)
    term = Drift(str(tiny_vae_folder), "raw", teacher(str(tiny_vae_folder)))
    theirs = teacher(str(tiny_vae_folder)).network.encode(images()).latent_dist.mean
    r = forward(model)
    scale = term.teacher.normalisation.scaling_factor
    assert term(r).item() == pytest.approx(((r.moments.mean - theirs) * scale).square().mean().item(), rel=1e-5)
    assert list(term.state_dict()) == [] and list(term.parameters()) == []
    narrow = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3).build()
    r = TrainableAutoencoder(narrow)(images(), torch.randn(2, 3, 16, 16))
    with refused(UsageError, "drift"):
        term(r)


def test_alignment_is_zero_where_latents_are_the_features() -> None:
    stem = Stem()
    term = Alignment(stem, 8, 8, 0.0, 0.0)
    term.project.weight.data.copy_(torch.eye(8)[:, :, None, None])
    r = forward(network(codes=False))
    features = stem((images() + 1) * 127.5).detach()
    perfect = Reconstruction(images(), r.pixels, r.target, r.moments, 3 * features, r.last_calls)
    assert term(perfect).item() == pytest.approx(0.0, abs=1e-5)
    other = Reconstruction(images(), r.pixels, r.target, r.moments, features.flip(3), r.last_calls)
    assert term(other).item() > 0.1
    with refused(UsageError, "latent_channels") as error:
        term(r)
    assert "4, got 8" in str(error.value)


def test_what_the_latent_carries_is_logged() -> None:
    r = forward(network(codes=False))
    logs = rate(r.moments, r.images)
    assert logs["kl_nats_per_channel"].shape == (4,)
    assert logs["kl_nats_per_channel"].sum().item() == pytest.approx(logs["kl_nats_per_image"].item(), rel=1e-5)
    assert logs["bits_per_pixel"].item() == pytest.approx(
        logs["kl_nats_per_image"].item() / 1024 / math.log(2), rel=1e-5
    )
    from ldm_vae.autoencoder.latents import Moments

    mean = torch.zeros(64, 3, 2, 2)
    mean[:, 1] = torch.randn(64, 2, 2)
    mean[:, 2] = 5.0  # far from the prior and always the same: it carries nothing
    assert rate(Moments(mean, torch.zeros_like(mean)), torch.zeros(64, 3, 8, 8))["active_units"] == 1


def test_the_bound_is_told_where_there_is_a_likelihood() -> None:
    objective = Objective({"gaussian_nll": GaussianNLL(levels=256), "kl": KL(weight=1.0)})
    r = forward(network(codes=False))
    _, logs = objective.pixel_terms(r.pixels, r)
    logs |= objective.latent_terms(r)[1]
    bound = objective.bound(logs, r.images)
    nats = logs["loss/gaussian_nll"] * 3072 + logs["kl_nats_per_image"]
    assert bound["elbo/nats_per_image"].item() == pytest.approx(-nats.item(), rel=1e-6)
    assert bound["elbo/bits_per_dimension"].item() == pytest.approx(nats.item() / 3072 / math.log(2), rel=1e-6)
    assert Objective({"l2": L2(), "kl": KL()}).bound(logs, r.images) == {}


@pytest.mark.parametrize(("kind", "codes"), [("kl", True), ("commitment", False)])
def test_a_term_that_the_model_cannot_feed_is_refused(kind: str, codes: bool, nothing: L1) -> None:
    objective = Objective({"l1": nothing, kind: __import__(f"ldm_vae.losses.{kind}", fromlist=["x"]).Config()})
    with refused(UsageError, f"losses.{kind}"):
        objective.attach(network(codes))


def test_the_spatial_map_adds_up_to_the_distance() -> None:
    term = LPIPS(TinyLPIPS(), 16)
    where = images().clone()
    where[:, :, :16] += 0.5  # the upper half differs
    spatial = term.spatial_map(where, images())
    assert spatial.shape == (2, 1, 32, 32)
    assert spatial.mean().item() == pytest.approx(term(where, images()).item(), rel=0.15)
    assert spatial[:, :, :12].mean() > 10 * spatial[:, :, 24:].mean()
