"""GroupNorm + SiLU as one operation: torch's form and the Triton kernels against autograd in fp64, and in a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused_norm
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from fork_server import fork
from torch import nn

from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.kernels import group_norm
from ldm_vae.kernels.group_norm import fuse_norms, group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without one the kernels run in Triton's interpreter
# numpy, in the interpreter, says that sigmoid is 0 where it is
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
EPS = 1e-6
Tensors = list[torch.Tensor]
# channels, groups, height, width: whole tiles; neither channels, positions nor members a power of 2; one position
SHAPES = [(32, 8, 16, 16), (12, 4, 5, 7), (96, 32, 3, 50), (16, 2, 1, 1)]


def drawn(channels: int, height: int, width: int, dtype: torch.dtype, mean: float = 1.0) -> Tensors:
    """x, weight, bias and a cotangent, x channels last."""
    torch.manual_seed(0)
    x = (torch.randn(2, channels, height, width) + mean).to(DEVICE, dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, device=DEVICE).to(torch.promote_types(dtype, torch.float32))
    return [x, weight, bias, torch.randn(x.shape).to(DEVICE, dtype)]


def by_autograd(operation: Callable[..., torch.Tensor], tensors: Tensors, groups: int) -> Tensors:
    """Output and the gradients of x, weight and bias."""
    *inputs, cotangent = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = operation(inputs[0], groups, *inputs[1:], EPS)
    return [y.detach(), *torch.autograd.grad(y, inputs, cotangent)]


def reference(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def by_kernel(tensors: Tensors, groups: int) -> Tensors:
    from ldm_vae.kernels import group_norm_triton

    x, weight, bias, cotangent = tensors
    y, mean, rstd = group_norm_triton.forward(x, weight, bias, groups, EPS)
    return [y, *group_norm_triton.backward(cotangent, x, weight, bias, mean, rstd, groups)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize(("channels", "groups", "height", "width"), SHAPES)
def test_the_operation_is_the_two_modules(channels: int, groups: int, height: int, width: int) -> None:
    tensors = drawn(channels, height, width, torch.float64)
    both = by_autograd(group_norm_silu, tensors, groups), by_autograd(reference, tensors, groups)
    for ours, wanted in zip(*both, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "groups", "height", "width"), SHAPES)
def test_the_kernels_are_autograd_in_fp64(channels: int, groups: int, height: int, width: int) -> None:
    tensors = drawn(channels, height, width, torch.float32)
    wanted = by_autograd(reference, [tensor.double() for tensor in tensors], groups)
    for name, ours, value in zip(["y", "x", "weight", "bias"], by_kernel(tensors, groups), wanted, strict=True):
        assert ours.shape == value.shape and error(ours, value) < 1e-5, name


def test_a_mean_far_above_the_deviation_costs_the_kernels_no_digits() -> None:
    tensors = drawn(16, 12, 12, torch.float32, mean=1000.0)
    wanted = by_autograd(reference, [tensor.double() for tensor in tensors], 4)
    assert error(by_kernel(tensors, 4)[0], wanted[0]) < 1e-4  # x itself has 3e-5 of a deviation as its last digit


def test_half_precision_is_rounded_once_by_the_kernels() -> None:
    tensors = drawn(32, 8, 8, torch.bfloat16)
    wide = [tensor.double() for tensor in tensors]
    ours, wanted = by_kernel(tensors, 8), by_autograd(reference, wide, 8)
    # the interpreter cuts off where a GPU rounds: 2^-8 at most
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16 and ours[2].dtype == torch.float32
    assert all(error(one, other) < 2**-8 for one, other in zip(ours, wanted, strict=True))


def test_a_value_does_not_depend_on_what_else_is_in_the_batch() -> None:
    from ldm_vae.kernels import group_norm_triton

    x, weight, bias, _ = drawn(32, 24, 24, torch.float32)
    both = group_norm_triton.forward(x, weight, bias, 8, EPS)[0]
    assert torch.equal(both[:1], group_norm_triton.forward(x[:1], weight, bias, 8, EPS)[0])


def test_what_is_kept_for_the_backward_is_the_input() -> None:
    x, weight, bias, _ = drawn(32, 16, 16, torch.bfloat16)
    x, weight, bias = (tensor.cpu().requires_grad_() for tensor in (x, weight, bias))
    with gpu_autocast("bf16"), Cost() as plain:
        kept = reference(x, 8, weight, bias, EPS).bfloat16()
    with Cost() as fused:
        ours = group_norm_silu(x, 8, weight, bias, EPS)
    assert kept.dtype == ours.dtype
    assert fused.bytes < 0.2 * plain.bytes + x.nbytes


def test_no_import_of_triton_without_a_gpu() -> None:
    done = fork(fused_norm.main, []).wait()
    assert done.stdout.split() == ["False", "False"], done.stderr


# --- in a network -----------------------------------------------------------------------------------------------------


def trained_once(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    pixels = vae.decode(vae.encode(images).latent_dist.mode()).sample
    gradients = torch.autograd.grad(pixels.square().mean(), list(vae.parameters()))
    return pixels.detach(), list(gradients)


def test_a_fused_network_keeps_its_names_and_its_result(tiny_vae: AutoencoderKL) -> None:
    vae, images = tiny_vae.double().train(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    pixels, gradients = trained_once(vae, images)
    names = list(vae.state_dict())
    norms = sum(isinstance(module, nn.GroupNorm) for module in vae.modules())
    vae.to(memory_format=torch.channels_last)
    assert fuse_norms(vae) == norms - 2  # those of the two attentions have no SiLU behind them
    assert fuse_norms(vae) == 0
    found, own = trained_once(vae, images)
    assert list(vae.state_dict()) == names and type(vae) is AutoencoderKL
    torch.testing.assert_close(found, pixels, rtol=1e-9, atol=1e-11)
    for ours, wanted in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [{"non_linearity": "relu"}, {"temb_channels": 8}, {"output_scale_factor": 2.0}, {"up": True}],
    ids=["activation", "time", "scale", "upsampling"],
)
def test_a_block_of_another_form_stays_as_it_is(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"in_channels": 8, "groups": 4, "temb_channels": None}
    block = ResnetBlock2D(**shape | changes)
    assert fuse_norms(block) == 0 and type(block) is ResnetBlock2D


def test_gradient_checkpointing_and_autocast_go_through_it(tiny_vae: AutoencoderKL) -> None:
    vae, images = tiny_vae.train(), torch.randn(1, 3, 16, 16)
    fuse_norms(vae)
    _, plain = trained_once(vae, images)
    vae.enable_gradient_checkpointing()
    _, again = trained_once(vae, images)
    for ours, wanted in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        pixels, _ = trained_once(vae, images)
    assert pixels.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_compiler_gets_the_modules_themselves() -> None:
    x, weight, bias, cotangent = drawn(8, 4, 4, torch.float32)
    compiled = torch.compile(group_norm_silu, backend="aot_eager", fullgraph=True)
    ours = by_autograd(compiled, [x, weight, bias, cotangent], 4)
    for one, other in zip(ours, by_autograd(group_norm_silu, [x, weight, bias, cotangent], 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_type_wider_than_the_kernels_is_torchs() -> None:
    assert group_norm._kernel(torch.zeros(1, dtype=torch.float64)) is None
    assert group_norm._kernel(torch.zeros(1)) is not None
