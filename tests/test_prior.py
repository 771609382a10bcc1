"""Priors over codes: against enumeration in fp64, the cache against the whole, samples against probabilities."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from sentences import refused
from torch import nn

from ldm_vae.core.errors import UsageError
from ldm_vae.prior.independent import Independent, Uses
from ldm_vae.prior.model import Prior
from ldm_vae.prior.order import OrderName, from_steps, table, to_steps
from ldm_vae.prior.sampling import SamplingConfig, draw, restrict
from ldm_vae.priors.masked import Config as MaskedConfig
from ldm_vae.priors.masked import Masked
from ldm_vae.priors.transformer import Causal, Walk
from ldm_vae.priors.transformer import Config as TransformerConfig

AS_LEARNED = SamplingConfig()


def stirred(prior: Prior) -> Prior:
    """In fp64 and eval mode, its weights far from where they start, at which all codes are alike."""
    draw = torch.Generator().manual_seed(1)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.5, generator=draw)
    return prior.double().eval().requires_grad_(False)


def causal(codes: int, shape: tuple[int, ...], order: OrderName = "raster", classes: int = 2) -> Causal:
    config = TransformerConfig(order=order, num_layers=2, num_attention_heads=2, attention_head_dim=4)
    prior = stirred(config.build(codes, shape, classes))
    assert isinstance(prior, Causal)
    return prior


def masked(codes: int, shape: tuple[int, ...], classes: int = 2) -> Masked:
    config = MaskedConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_res_blocks=1)
    prior = stirred(config.build(codes, shape, classes))
    assert isinstance(prior, Masked)
    return prior


def everything(codes: int, shape: tuple[int, ...]) -> torch.Tensor:
    """All images of so many codes [codes ** n, *shape]."""
    return torch.tensor(list(itertools.product(range(codes), repeat=math.prod(shape)))).view(-1, *shape)


SPACES: list[tuple[int, tuple[int, ...], OrderName]] = [
    (3, (1, 2, 2), "raster"),
    (2, (1, 2, 1, 3), "raster"),  # a clip
    (2, (2, 1, 3), "raster"),
    (2, (2, 1, 3), "delay"),
    (2, (3, 1, 2), "delay"),
]


@pytest.mark.parametrize(("codes", "shape", "order"), SPACES)
@pytest.mark.parametrize("label", [0, 2])
def test_the_probabilities_of_all_images_sum_to_one(
    codes: int, shape: tuple[int, ...], order: OrderName, label: int
) -> None:
    prior, images = causal(codes, shape, order), everything(codes, shape)
    labels = torch.full((len(images),), label)
    nats = prior.nats(images, labels, 0, range(len(images)))
    assert nats.dtype == torch.float64
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-12)
    # the probability of each, step by step: what a coder of these indices would use
    walk, before, product = Walk(prior.network, labels), None, torch.ones(len(images), dtype=torch.float64)
    steps = to_steps(images.flatten(1), prior.network.places, codes)
    for step, real in enumerate(prior.network.places >= 0):
        likely = walk.next(before).softmax(dim=-1)
        before = steps[:, step]
        chosen = likely.gather(-1, before.clamp(max=codes - 1)[..., None])[..., 0]
        product *= torch.where(real, chosen, 1.0).prod(dim=1)
    bits = nats / math.log(2)
    torch.testing.assert_close(bits, -product.log2(), atol=1e-12, rtol=1e-12)
    # it trains by what it measures, and labels and places matter
    loss = prior(images, labels, 0, range(len(images)))
    assert float(loss) == pytest.approx(float(nats.mean()) / math.prod(shape), abs=1e-12)
    assert float(bits.std()) > 0.1
    assert not torch.allclose(nats, prior.nats(images, torch.ones_like(labels), 0, range(len(images))))


@pytest.mark.parametrize(("codes", "shape", "order"), SPACES)
def test_a_step_sees_no_later_one(codes: int, shape: tuple[int, ...], order: OrderName) -> None:
    prior = causal(codes, shape, order)
    places, one = prior.network.places, torch.zeros(1, *shape, dtype=torch.long)
    labels = torch.zeros(1, dtype=torch.long)
    logits = prior.network(to_steps(one.flatten(1), places, codes), labels)
    for step in range(len(places)):
        other = one.flatten(1).clone()
        later = places[step:]
        other[:, later[later >= 0]] = 1
        changed = prior.network(to_steps(other, places, codes), labels)
        assert torch.equal(changed[:, : step + 1], logits[:, : step + 1])
        assert step + 1 == len(places) or not torch.allclose(changed[:, step + 1 :], logits[:, step + 1 :])


def test_orders_hold_each_index_once_and_come_back() -> None:
    assert table("raster", 2, 3).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert table("delay", 2, 3).T.tolist() == [[0, 1, 2, -1], [-1, 3, 4, 5]]
    assert torch.equal(table("delay", 1, 5), table("raster", 1, 5))
    indices = torch.arange(24).view(2, 12)
    for order in ("raster", "delay"):
        places = table(order, 3, 4)
        assert sorted(places[places >= 0].tolist()) == list(range(12))
        steps = to_steps(indices, places, 99)
        assert torch.equal(from_steps(steps, places), indices)
        assert int((steps == 99).sum()) == 2 * int((places < 0).sum())


@pytest.mark.parametrize(("codes", "shape", "order"), SPACES[:1] + SPACES[3:])
def test_samples_are_drawn_by_their_probability(codes: int, shape: tuple[int, ...], order: OrderName) -> None:
    """Over 4,000 samples, the frequency of each image is within the noise of its probability."""
    prior, images = causal(codes, shape, order), everything(codes, shape)
    count, labels = 4000, torch.zeros(4000, dtype=torch.long)
    drawn = prior.sample(labels, 7, range(count), AS_LEARNED)
    weights = codes ** torch.arange(math.prod(shape)).flip(0)
    seen = torch.bincount(drawn.flatten(1) @ weights, minlength=len(images))
    p = torch.exp(-prior.nats(images, labels[: len(images)], 0, range(len(images))))
    chi_squared = float(((seen - count * p).square() / (count * p).clamp(min=1e-9))[count * p > 5].sum())
    freedom = int((count * p > 5).sum())
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["transformer", "masked"])
def test_samples_are_the_same_in_any_batch(kind: str, device: str) -> None:
    prior: Prior = causal(5, (1, 2, 3)) if kind == "transformer" else masked(5, (1, 2, 3))
    labels = torch.arange(6, device=device) % 3
    prior.to(device)
    sampling = SamplingConfig(temperature=0.8, top_k=4, top_p=0.9, steps=4)
    whole = prior.sample(labels, 3, range(6), sampling)
    parts = [prior.sample(labels[i : i + n], 3, range(i, i + n), sampling) for i, n in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(whole, torch.cat(parts))
    loss = prior(whole, labels, 0, range(6))
    assert loss.device == whole.device == labels.device and prior.nats(whole, labels, 0, range(6)).shape == (6,)
    assert whole.shape == (6, 1, 2, 3) and int(whole.max()) < 5
    assert not torch.equal(whole, prior.sample(labels, 4, range(6), sampling))
    assert len({tuple(row) for row in whole.flatten(1).tolist()}) > 1


def test_the_cache_gives_what_the_whole_gives() -> None:
    prior = causal(4, (2, 3, 3), "delay").float()
    images = torch.randint(4, (3, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3)
    steps = to_steps(images.flatten(1), prior.network.places, 4)
    whole = prior.network(steps, labels)
    walk = Walk(prior.network, labels)
    for step in range(steps.shape[1]):
        logits = walk.next(steps[:, step - 1] if step else None)
        torch.testing.assert_close(logits, whole[:, step], atol=1e-5, rtol=1e-5)


def test_checkpointing_recomputes_the_same() -> None:
    prior = causal(4, (1, 2, 2)).requires_grad_(True).train()
    images, labels = everything(4, (1, 2, 2))[::17], torch.zeros(16, dtype=torch.long)
    found = []
    for switch in (prior.network.disable_gradient_checkpointing, prior.network.enable_gradient_checkpointing):
        switch()
        prior.zero_grad()
        prior(images, labels, 0, range(16)).backward()
        found.append(prior.network.tokens.weight.grad.clone())
    torch.testing.assert_close(*found, atol=1e-14, rtol=0)


# --- the masked one ---------------------------------------------------------------------------------------------------


def test_the_bound_is_that_of_a_random_order() -> None:
    """Over all masks it is the mean over all orders of -log p, which is at least -log of their mixture."""
    prior, images = masked(2, (1, 1, 3)), everything(2, (1, 1, 3))
    labels = torch.ones(8, dtype=torch.long)

    def of(hidden: tuple[int, ...]) -> torch.Tensor:
        mask = torch.zeros(8, 3, dtype=torch.bool)
        mask[:, list(hidden)] = True
        return prior.masked_nats(images, labels, mask)

    expected = torch.zeros(8, dtype=torch.float64)
    for size in (1, 2, 3):
        subsets = list(itertools.combinations(range(3), size))
        expected += sum(3 / size * of(hidden) for hidden in subsets) / len(subsets) / 3
    # -log p in one order: the first of it given nothing, and so on
    orders = []
    for order in itertools.permutations(range(3)):
        logp = torch.zeros(8, dtype=torch.float64)
        for place, chosen in enumerate(order):
            hidden = torch.zeros(8, 3, dtype=torch.bool)
            hidden[:, list(order[place:])] = True
            logits = prior._logits(images.flatten(1).masked_fill(hidden, 2).view_as(images), labels)
            logp += logits.log_softmax(dim=1)[:, :, chosen].gather(1, images.flatten(1)[:, chosen, None])[:, 0]
        orders.append(logp)
    torch.testing.assert_close(expected, -torch.stack(orders).mean(dim=0), atol=1e-12, rtol=1e-12)
    mixture = torch.stack(orders).logsumexp(dim=0) - math.log(6)
    assert float(mixture.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert bool((expected >= -mixture).all()) and float((expected + mixture).max()) > 1e-4
    # and what is measured is an estimate of it
    assert not prior.is_exact
    count = 3000
    drawn = prior.nats(images[5:6].expand(count, -1, -1, -1), labels[:1].expand(count), 0, range(count))
    assert float(drawn.mean()) == pytest.approx(float(expected[5]), abs=4 * float(drawn.std()) / math.sqrt(count))


def test_masked_training_hides_what_it_is_asked_for() -> None:
    """Its loss is that of the masked indices alone, keyed by place in the stream and not by place in the batch."""
    prior, images = masked(3, (1, 2, 2)), everything(3, (1, 2, 2))[5:11]
    labels = torch.zeros(6, dtype=torch.long)
    whole = float(prior(images, labels, 0, range(6)))
    parts = [float(prior(images[i : i + 2], labels[:2], 0, range(i, i + 2))) for i in (0, 2, 4)]
    assert whole == pytest.approx(sum(parts) / 3, abs=1e-12)
    assert whole != pytest.approx(float(prior(images, labels, 0, range(6, 12))), abs=1e-6)


def test_several_codebooks_are_not_for_masks() -> None:
    with refused(UsageError, "kind transformer takes them"):
        MaskedConfig(hidden_size=8, num_attention_heads=2).build(4, (2, 2, 2), 0)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_restrictions_are_their_definitions() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64).log()[None].repeat(2, 1)[:, [2, 0, 3, 1]]

    def kept(**settings: float) -> list[float]:
        return restrict(logits, SamplingConfig(**settings)).softmax(dim=-1)[0].tolist()

    assert kept(top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert kept(top_p=0.76) == pytest.approx([0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9])
    assert kept(top_p=0.74) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert kept(top_p=0.01) == pytest.approx([0, 1, 0, 0])
    squares = [0.0225, 0.25, 0.01, 0.0625]
    assert kept(temperature=0.5) == pytest.approx([square / sum(squares) for square in squares])
    assert kept(top_k=9) == kept(top_p=1.0) == pytest.approx([0.15, 0.5, 0.1, 0.25])


def test_a_draw_is_the_inverse_of_the_cumulative_probability() -> None:
    logits = torch.tensor([-torch.inf, 0.25, 0.75, 0.0])
    logits[1:3] = logits[1:3].log()
    logits[3] = -torch.inf
    grid = torch.arange(400, dtype=torch.float64) / 400
    drawn = draw(logits.expand(400, 4), grid)
    assert torch.bincount(drawn, minlength=4).tolist() == [0, 100, 300, 0]
    assert int(draw(logits, torch.tensor(1 - 2**-53, dtype=torch.float64))) == 2


# --- independent codes ------------------------------------------------------------------------------------------------


def test_independent_codes_are_distributions_of_their_frequencies() -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(3, (500, 1, 1, 2), generator=draws)
    images[:, 0, 0, 1] = torch.where(torch.rand(500, generator=draws) < 0.9, 2, images[:, 0, 0, 1])
    independent = Independent(images.split(64), 3, (1, 1, 2))
    space = everything(3, (1, 1, 2))
    for which in (independent.position, independent.overall):
        assert float(torch.exp(-independent.nats(space, which)).sum()) == pytest.approx(1, abs=1e-12)
    overall = (torch.bincount(images.flatten(), minlength=3) + 1) / 1003
    torch.testing.assert_close(independent.overall[0, 0].exp(), overall.double())
    seen = torch.bincount(images[:, 0, 0, 1], minlength=3).double()
    torch.testing.assert_close(independent.position[0, 1].exp(), (seen + 3 * overall.double()) / 503)
    assert independent.nats(images, independent.position).mean() < independent.nats(images, independent.overall).mean()
    uses = Uses(2, 3)
    uses.update(torch.tensor([[[0, 0, 1, 1]], [[2, 2, 2, 2]]]).movedim(0, 1))
    assert uses.entropy() == pytest.approx(math.log(2) / 2)
    drawn = independent.sample(0, range(2000))
    shares = torch.bincount(drawn[:, 0, 0, 1], minlength=3) / 2000
    torch.testing.assert_close(shares, independent.position[0, 1].exp().float(), atol=0.04, rtol=0)
    assert torch.equal(drawn[3:5], independent.sample(0, [3, 4]))


def test_both_kinds_learn(tmp_path: Path) -> None:
    """A chessboard or its complement: one bit an image, where independent codes need one an index."""
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2
    images = torch.stack([board, 1 - board])[:, None].repeat(8, 1, 1, 1)
    labels = torch.zeros(16, dtype=torch.long)
    for config in (
        TransformerConfig(num_layers=1, num_attention_heads=2, attention_head_dim=8),
        MaskedConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_res_blocks=1),
    ):
        torch.manual_seed(0)
        prior: Prior = config.build(2, (1, 4, 4), 0)
        optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
        for step in range(80):
            prior(images, labels, 0, range(16 * step, 16 * step + 16)).backward()
            optimizer.step()
            optimizer.zero_grad()
        prior.eval()
        with torch.no_grad():
            bits = float(prior.nats(images, labels, 0, range(16)).mean()) / math.log(2)
        assert bits < 3, (config.kind, bits)
        drawn = prior.sample(labels, 0, range(16), SamplingConfig(steps=8))
        whole = sum(bool((drawn[row] == images[0]).all() or (drawn[row] == images[1]).all()) for row in range(16))
        assert whole > 12, (config.kind, whole)
        prior.save(tmp_path / config.kind)
        assert (tmp_path / config.kind / "config.json").is_file()
