"""The perceptual term: the lpips package's numbers and gradients, at half of its graph, and no part of any state."""

from __future__ import annotations

import copy

import pytest
import torch
from sentences import refused
from torch import nn

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.losses.lpips import Config
from ldm_vae.perceptual.lpips import LPIPS
from ldm_vae.perceptual.pretrained import lpips_trunk
from ldm_vae.training.objective import Objective


@pytest.fixture(scope="module", params=["alex", "vgg"])
def term(request: pytest.FixtureRequest) -> LPIPS:
    try:
        lpips_trunk(request.param)
    except WorkError as error:
        pytest.skip(str(error))
    return Config(net=request.param).build()


def pair(channels: int = 3, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    target = torch.rand(2, channels, size, size, generator=draw) * 2 - 1
    return (target + 0.3 * torch.randn(target.shape, generator=draw)).requires_grad_(), target


def saved_floats(forward: object) -> int:
    """Numbers that the graph keeps for the backward pass, each storage counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()  # type: ignore[operator]
    assert loss.requires_grad
    return sum(kept.values())


def test_value_and_gradient_are_the_packages(term: LPIPS) -> None:
    pixels, target = pair()
    loss = term(pixels, target)
    (gradient,) = torch.autograd.grad(loss, pixels)
    reference = term.network(pixels, target).mean()
    (expected,) = torch.autograd.grad(reference, pixels)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert expected.abs().max() > 0


def test_the_target_gets_no_graph_and_no_gradient(term: LPIPS) -> None:
    pixels, target = pair(size=64)
    target.requires_grad_()
    weights = sum(weight.numel() for weight in term.network.parameters())
    ours = saved_floats(lambda: term(pixels, target)) - weights
    package = saved_floats(lambda: term.network(pixels, target)) - weights
    assert ours < 0.75 * package
    assert torch.autograd.grad(term(pixels, target), (pixels, target), allow_unused=True)[1] is None


def test_no_gradient_is_nan_where_the_features_vanish(term: LPIPS) -> None:
    dead = copy.deepcopy(
        term
    )  # the first layer's ReLU leaves nothing: the root of the norm has an infinite slope there
    for weight in dead.network.net.slice1.parameters():
        weight.zero_()
    pixels, target = pair()
    (gradient,) = torch.autograd.grad(dead(pixels, target), pixels)
    assert gradient.isfinite().all()


def test_an_image_is_at_no_distance_from_itself(term: LPIPS) -> None:
    _, target = pair()
    assert term(target, target).item() == 0.0


def test_grey_images_are_those_of_three_equal_channels(term: LPIPS) -> None:
    pixels, target = pair(channels=1)
    assert term(pixels, target).item() == pytest.approx(
        term(pixels.repeat(1, 3, 1, 1), target.repeat(1, 3, 1, 1)).item()
    )


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (1, 3, 64, 8)])
def test_other_images_are_refused_in_a_sentence(term: LPIPS, shape: tuple[int, ...]) -> None:
    with refused(UsageError, "losses.lpips"):
        term(torch.zeros(shape), torch.zeros(shape))


def test_the_smallest_image_is_the_smallest_that_works(term: LPIPS) -> None:
    side = term.smallest
    small = torch.rand(1, 3, side, side)
    assert term(small, -small).isfinite()
    smaller = torch.zeros(1, 3, side - 1, side - 1)
    with pytest.raises(RuntimeError, match="too small"):
        term.network(smaller, smaller)


def test_it_is_computed_in_fp32_under_autocast(term: LPIPS) -> None:
    pixels, target = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(pixels.bfloat16(), target.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == term(pixels.bfloat16().float(), target.bfloat16().float()).item()


def test_the_network_is_frozen_and_in_no_state(term: LPIPS) -> None:
    objective = Objective({"lpips": Config(net="alex" if term.smallest == 31 else "vgg")})
    for module in (term, objective):
        assert not list(module.state_dict()) and not list(module.parameters()) and not list(module.buffers())
    assert not any(weight.requires_grad for weight in term.network.parameters())
    nn.ModuleList([term]).train()
    assert not any(module.training for module in term.network.modules())


def test_it_follows_to_a_device_and_stays_in_fp32(term: LPIPS) -> None:
    moved = nn.ModuleList([copy.deepcopy(term)]).double().to("meta")
    assert isinstance(moved[0], LPIPS)
    weights = list(moved[0].network.parameters())
    assert {weight.device.type for weight in weights} == {"meta"}
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert {weight.device.type for weight in term.network.parameters()} == {"cpu"}
