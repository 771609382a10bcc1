"""Shapes that were found once are what torch finds, and nothing that has values is taken for one that has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_classes import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.meta import without_values
from ldm_vae.core import shape_memo
from ldm_vae.core.shape_memo import ShapeMemo


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_memo, "_KNOWN", {})


class Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operations that torch is asked for, but for the empty tensors that stand for what is known."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.empty_strided.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def metadata(tensors: Any) -> list[Any]:
    return [None if one is None else (one.shape, one.stride(), one.dtype, one.device) for one in tensors]


def every_make() -> Iterator[torch.Tensor | None]:
    """Outputs of operations of every make, each at two shapes and twice."""
    for side in (4, 6, 4):
        x = torch.empty(2, 4, side, side, device="meta", requires_grad=True)
        weight = torch.empty(3, 4, 3, 3, device="meta")
        y = torch.nn.functional.conv2d(x, weight, padding=1)  # no gradient of the bias and the weight
        yield from (y, x * 2, x * 2.0, x.half() * 2, x.flatten(1).softmax(1), x.permute(0, 2, 3, 1).contiguous() + 1)
        yield from (x.to(torch.int64) * 2, x.to(torch.int64) * 2.0, x.double().sum(1, keepdim=True), x @ x)
        yield from (*x.sort(), *torch.nn.functional.group_norm(x, 2).chunk(2), torch.linalg.vector_norm(x, dim=1))
        yield from (torch.cat([x, x * 0, x[:, :1]], 1), torch.arange(side, device="meta"), x.clone().add_(1.0))
        yield from torch.autograd.grad(y.sum(), x)


def test_it_finds_what_torch_finds() -> None:
    expected = metadata(every_make())
    with ShapeMemo():
        assert metadata(every_make()) == expected and metadata(every_make()) == expected


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel", "AutoencoderDC"])
def test_a_network_is_asked_for_its_new_shapes_only(name: str) -> None:
    vae, asked = without_values(tiny(name)), []
    for _ in range(2):
        with Asked() as one, ShapeMemo():
            images = torch.empty(1, 3, 64, 64, device="meta")
            pixels = latents.decode(vae, latents.encode(vae, images).mean)
        asked.append(one.names)
        assert pixels.shape == images.shape and pixels.grad_fn is not None
    views = {"detach", "view", "_unsafe_view", "expand", "transpose", "permute", "t", "unsqueeze", "split", "slice"}
    assert "convolution" in asked[0]
    assert set(asked[1]) <= views | {"_reshape_alias", "select", "alias", "split_with_sizes", "unbind", "squeeze"}


def test_memory_of_a_view_is_its_tensors_own() -> None:
    with FakeTensorMode(), ShapeMemo():
        for _ in range(2):
            x = torch.empty(4, 6)
            assert torch.ops.aten._unsafe_view(x, [6, 4]).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.view(24).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata


def test_what_has_values_keeps_them() -> None:
    with ShapeMemo():
        kept = [torch.full((1000,), 7.25) for _ in range(3)]  # from nothing
        assert all(bool((one == 7.25).all()) for one in kept)
        for value in (1.0, 2.0, 3.0):
            real = torch.full((2,), value)
            assert (real + 1).tolist() == [value + 1] * 2 and torch.cat([real, real]).sum() == 4 * value
    with FakeTensorMode(), ShapeMemo():
        assert torch.empty((), dtype=torch.int64).add(1).shape == ()
        for number in (1, 2):  # fake, and has a value
            assert torch.tensor(number).add(1).item() == number + 1
