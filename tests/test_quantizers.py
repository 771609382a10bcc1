"""Codebooks: trained on VQModel's own embedding, followed, restarted and counted over all ranks, and at inference
exactly what diffusers' VQModel does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from scipy import stats

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Codes
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.losses.codebook import Config as CodebookLoss
from ldm_vae.losses.commitment import Config as Commitment
from ldm_vae.models.vq import Config
from ldm_vae.quantizers import usage
from ldm_vae.quantizers.gumbel import Config as Gumbel
from ldm_vae.quantizers.gumbel import gumbel

SHAPE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 3}


def network(codes: int = 32, **quantizer: Any) -> TrainableAutoencoder:
    torch.manual_seed(0)
    config = Config(**SHAPE, num_vq_embeddings=codes, quantizer=quantizer or {"kind": "vq"})
    vae = config.build()
    with torch.no_grad():  # rows where the vectors are, so that several are in use
        h = vae.encode(images(8)).latents.permute(0, 2, 3, 1).flatten(0, 2)
        vae.quantize.embedding.weight.copy_(h[torch.randint(len(h), (codes,))])
    return TrainableAutoencoder(vae, config.bottleneck(vae))


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def forward(model: TrainableAutoencoder, count: int = 4, images_seen: int = 0, seed: int = 0) -> Any:
    noise = torch.randn(count, *model.noise_shape(16, 16), generator=torch.Generator().manual_seed(seed))
    return model(images(count, seed), noise, images_seen)


def update(model: TrainableAutoencoder, images_seen: int = 0, seed: int = 0) -> Any:
    """A forward, and what the codebook makes of it."""
    r = forward(model, images_seen=images_seen, seed=seed)
    model.bottleneck.after_update(model.vae)
    return r


def diffusers_indices(vae: VQModel, h: torch.Tensor) -> torch.Tensor:
    return vae.quantize(h)[2][2].view(len(h), *h.shape[2:])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("codebook", ["ema", "learned"])
def test_the_codes_are_those_of_diffusers(distance: str, codebook: str) -> None:
    model = network(kind="vq", distance=distance, codebook=codebook)
    r = forward(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for seed in range(5):
        r = forward(model, seed=seed)
        loss = r.pixels.square().mean() + Commitment().build()(r)
        (loss + (CodebookLoss().build()(r) if codebook == "learned" else 0.0)).backward()
        optimizer.step()
        model.bottleneck.after_update(model.vae)
        optimizer.zero_grad()
    with torch.no_grad():
        r = forward(model)
        h = model.vae.encode(images()).latents
        assert torch.equal(r.codes.indices, diffusers_indices(model.vae, h))
        torch.testing.assert_close(latents.decode(model.vae, h), r.pixels, rtol=1e-4, atol=1e-4)
        assert len(r.codes.indices.unique()) > 1
        if distance == "cosine":
            norms = model.vae.quantize.embedding.weight.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_gradient_goes_straight_through() -> None:
    model = network()
    r = forward(model)
    (of_z,) = torch.autograd.grad((r.latents * 2.0).sum(), r.codes.before, retain_graph=True)
    assert torch.equal(of_z, torch.full_like(of_z, 2.0))
    r.pixels.sum().backward()
    assert model.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.vae.quantize.embedding.weight.grad is None


def test_losses_are_the_papers() -> None:
    """diffusers' own loss, which puts beta on the codebook term (its `legacy`), from our two terms."""
    model = network(kind="vq", codebook="learned")
    r = forward(model)
    theirs = model.vae.quantize(model.vae.encode(images()).latents)[1]
    ours = Commitment().build()(r) + model.vae.quantize.beta * CodebookLoss().build()(r)
    torch.testing.assert_close(ours, theirs)
    (to_encoder,) = torch.autograd.grad(Commitment().build()(r), r.codes.before, retain_graph=True)
    assert to_encoder.abs().sum() > 0
    assert torch.autograd.grad(CodebookLoss().build()(r), r.codes.before, allow_unused=True)[0] is None


def test_the_codebook_follows_the_closed_form_average() -> None:
    model = network(codes=8, kind="vq", decay=0.9, restart_images=None)
    book = model.vae.quantize.embedding.weight
    counts, sums = torch.ones(8), book.detach().clone()
    for seed in range(3):
        r = update(model, seed=seed)
        vectors, indices = r.codes.before.detach().permute(0, 2, 3, 1).flatten(0, 2), r.codes.indices.flatten()
        found = torch.stack([vectors[indices == code].sum(dim=0) for code in range(8)])
        number = torch.bincount(indices, minlength=8).float()
        counts, sums = 0.9 * counts + 0.1 * number, 0.9 * sums + 0.1 * found
    torch.testing.assert_close(book.detach(), sums / counts[:, None], rtol=1e-4, atol=1e-5)
    assert not book.requires_grad


def test_nothing_moves_without_a_graph() -> None:
    model = network()
    before = model.vae.quantize.embedding.weight.clone()
    with torch.no_grad():
        forward(model)
    assert model.bottleneck.statistics.pending.sum is None
    forward(model)  # a micro-batch that is not the last of its update
    assert torch.equal(before, model.vae.quantize.embedding.weight) and not model.bottleneck.statistics.uses.any()
    model.bottleneck.after_update(model.vae)
    assert not torch.equal(before, model.vae.quantize.embedding.weight) and model.bottleneck.statistics.uses.any()


@pytest.mark.parametrize("quantizer", [{"kind": "vq"}, {"kind": "gumbel"}, {"kind": "fsq", "levels": [4, 4, 2]}])
def test_a_frozen_encoder_keeps_its_codebook(quantizer: dict[str, Any]) -> None:
    model = network(codes=32, **quantizer)
    model.encoder_learns = False
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    forward(model)
    figures = model.bottleneck.after_update(model.vae)
    assert ("codes/usage" in figures) == (quantizer["kind"] != "vq")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_dead_codes_come_back_to_life() -> None:
    model = network(codes=64, kind="vq", restart_images=16)
    book = model.vae.quantize.embedding.weight
    with torch.no_grad():
        book[32:] += 100.0  # nothing will ever be near these
        model.bottleneck.statistics.sums.copy_(book)
    for seen in (0, 4, 8, 12):
        update(model, images_seen=seen, seed=seen)
        assert (book[32:] > 50).all()
    r = update(model, images_seen=16, seed=16)
    vectors = r.codes.before.detach().permute(0, 2, 3, 1).flatten(0, 2)
    assert (torch.cdist(book[32:], vectors).amin(dim=1) < 1e-2).all()
    assert update(model, images_seen=20, seed=20).codes.indices.max() >= 32
    other = network(codes=64, kind="vq", restart_images=None)
    with torch.no_grad():
        other.vae.quantize.embedding.weight[32:] += 100.0
        other.bottleneck.statistics.sums.copy_(other.vae.quantize.embedding.weight)
    for seen in range(0, 64, 4):
        update(other, images_seen=seen)
    assert (other.vae.quantize.embedding.weight[32:] > 50).all()


def test_statistics_go_on_after_a_resume() -> None:
    model, resumed = network(kind="vq", restart_images=8), network(kind="vq", restart_images=8)
    for seen in (0, 4, 8):
        update(model, images_seen=seen, seed=seen)
    resumed.vae.load_state_dict(model.vae.state_dict())
    resumed.bottleneck.load_state_dict(model.bottleneck.state_dict())
    for one in (model, resumed):
        update(one, images_seen=12, seed=3)
        update(one, images_seen=16, seed=4)
    assert torch.equal(model.vae.quantize.embedding.weight, resumed.vae.quantize.embedding.weight)


def test_usage_and_perplexity() -> None:
    even = usage(torch.tensor([5.0, 5.0, 5.0, 5.0]))
    assert even["codes/perplexity"].item() == pytest.approx(4.0) and even["codes/usage"] == 1.0
    one = usage(torch.tensor([0.0, 7.0, 0.0, 0.0]))
    assert one["codes/perplexity"].item() == pytest.approx(1.0) and one["codes/usage"] == 0.25
    shares = torch.rand(100)
    assert usage(shares)["codes/perplexity"].item() == pytest.approx(math.exp(stats.entropy(shares.numpy())), rel=1e-4)


# --- finite scalars ---------------------------------------------------------------------------------------------------


def test_rounded_channels_are_the_nearest_rows_of_a_grid() -> None:
    model = network(codes=24, kind="fsq", levels=[4, 2, 3])
    book = model.vae.quantize.embedding.weight
    axes = np.meshgrid([-1, -1 / 3, 1 / 3, 1], [-1, 1], [-1, 0, 1], indexing="ij")
    np.testing.assert_allclose(book.detach().numpy(), np.stack(axes, axis=-1).reshape(24, 3), atol=1e-6)
    with torch.no_grad():  # vectors within the grid and beyond it
        model.vae.quant_conv.weight.mul_(3)
    r = forward(model)
    assert r.codes.before.abs().max() > 1 and len(r.codes.indices.unique()) > 6
    h = model.vae.encode(images()).latents
    assert torch.equal(r.codes.indices, diffusers_indices(model.vae, h))
    assert torch.equal(r.codes.after, model.vae.quantize.embedding(r.codes.indices).permute(0, 3, 1, 2))
    with torch.no_grad():
        torch.testing.assert_close(latents.decode(model.vae, h), r.pixels, rtol=1e-4, atol=1e-5)
    (of_z,) = torch.autograd.grad((r.latents * 2.0).sum(), r.codes.before)
    assert torch.equal(of_z, torch.full_like(of_z, 2.0)) and not book.requires_grad


@pytest.mark.parametrize("levels", [[4, 2, 2], [4, 6]])
def test_a_grid_of_another_size_is_refused(levels: list[int]) -> None:
    with pytest.raises(
        UsageError, match=r"quantizer\.levels: .* expected model\.num_vq_embeddings 24 and .*channels 3"
    ):
        network(codes=24, kind="fsq", levels=levels)


# --- Gumbel -----------------------------------------------------------------------------------------------------------


def test_the_temperature_falls_along_a_half_cosine() -> None:
    config = Gumbel(temperature=1.0, final_temperature=0.0625, anneal_images=100)
    assert [config.temperature_at(n) for n in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.53125, 0.0625, 0.0625])


def test_gumbel_noise_is_gumbel_and_each_images_own() -> None:
    noise = torch.randn(4, 1, 2, 2)
    like = torch.empty(4, 64, 512)
    drawn = gumbel(noise, like)
    assert stats.kstest(drawn[0].flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    together = torch.corrcoef(drawn.flatten(1))
    assert (together - torch.eye(4)).abs().max() < 0.03
    assert torch.equal(gumbel(noise[2:3], like[:1])[0], drawn[2])  # neither neighbours nor the rank matter
    assert stats.kstest(torch.diff(drawn[0].flatten()[::2]).numpy() / 1, stats.logistic.cdf).pvalue > 1e-3


@pytest.mark.slow
def test_drawn_codes_follow_the_softmax() -> None:
    """At any temperature the largest weight falls on a code with its softmax probability (Gumbel-max)."""
    model = network(codes=4, kind="gumbel", temperature=0.5, hard=True)
    vae, book = model.vae, model.vae.quantize.embedding.weight
    h = vae.encode(images(1)).latents.detach()
    rows = h[0, :, 0, 0]
    expected = torch.softmax(-(rows - book).square().sum(dim=1), dim=0)
    found = torch.zeros(4)
    for seed in range(400):
        z = forward_z(model, seed)
        found[torch.cdist(z[None], book).argmin()] += 1 / 400
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.08)


def forward_z(model: TrainableAutoencoder, seed: int) -> torch.Tensor:
    noise = torch.randn(1, *model.noise_shape(16, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.bottleneck.encode(model.vae, images(1), noise, 0).latents[0, :, 0, 0]


def test_the_annealed_network_is_a_vqmodel() -> None:
    model = network(codes=32, kind="gumbel")
    r = forward(model)
    h = model.vae.encode(images()).latents
    assert torch.equal(r.codes.indices, diffusers_indices(model.vae, h))
    looked_up = model.vae.quantize.embedding(r.codes.indices).permute(0, 3, 1, 2)
    assert torch.equal(looked_up, r.codes.after)
    with torch.no_grad():
        torch.testing.assert_close(
            latents.decode(model.vae, h), model.vae.decode(looked_up, force_not_quantize=True).sample,
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_the_rate_of_codes_is_against_the_uniform_prior() -> None:
    r = forward(network(codes=32, kind="gumbel"))
    assert isinstance(r.codes, Codes) and r.codes.kl is not None
    book, h = r.codes, r.codes.before[0, :, 0, 0]
    assert book.kl.min() >= 0 and book.kl.max() <= math.log(32) + 1e-6
    model = network(codes=32, kind="gumbel")
    q = torch.softmax(-(h - model.vae.quantize.embedding.weight).square().sum(dim=1), dim=0).detach().numpy()
    assert r.codes.kl[0, 0, 0].item() == pytest.approx(stats.entropy(q, [1 / 32] * 32), rel=1e-2)
