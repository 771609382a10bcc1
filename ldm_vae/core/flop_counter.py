"""Counts of operations and memory of a program; on tensors without content (FakeTensorMode) nothing is computed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from ldm_vae.core.shape_memo import ShapeMemo


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _convolution_backward(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, *rest: Any, **__: Any
) -> int:
    transposed, wanted = rest[4], rest[7]
    gradients: int = sum(wanted[:2])
    forward = conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)  # type: ignore[arg-type]
    return int(forward) * gradients  # each costs what the forward pass does


# torch counts convolutions, matrix products and the attention of GPUs; the CPU's is another operation. Of a
# grouped convolution it counts the weight's gradient as without groups: 8,579 GFLOP for a step of dc_f32_d32, not 2,711
COUNTS = flop_registry | {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Cost(ShapeMemo):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of what runs inside (a multiplication and an addition are two), and the
    largest number of bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: int = 0
        self.bytes: int = 0
        self.peak_bytes: int = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (count := COUNTS.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        made = not any(returned.alias_info for returned in func._schema.returns)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage(), made)
        return out

    def _hold(self, storage: torch.UntypedStorage, made: bool) -> None:
        if storage in self._seen:
            return
        # a view of a tensor from outside, or one that was written to: of every linear layer the weight
        size = storage.nbytes() if made else 0
        self._seen[storage] = size
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.bytes -= size


@contextlib.contextmanager
def gpu_autocast(mixed_precision: str) -> Iterator[None]:
    """Inside, networks on the CPU hold what they would on a GPU under autocast (`no`, `bf16`, `fp16`): a GPU's keeps
    norms and what comes out of them in fp32, the CPU's does not. With Stable Diffusion's shape at batch 8 and 256 px
    the count then is 18.4 GB, an H100 held 18.7; with the CPU's rules it was 12.2, so for a
    CPU under bf16 the count is too high."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    if dtype is None:
        yield
        return
    norms = {name: getattr(F, name) for name in ("group_norm", "layer_norm")}
    try:
        for name, norm in norms.items():  # not a TorchFunctionMode: a backward that computes activations again has none
            setattr(F, name, lambda x, *rest, norm=norm, **more: norm(x.float(), *rest, **more))
        with torch.autocast("cpu", dtype):
            yield
    finally:
        for name, norm in norms.items():
            setattr(F, name, norm)
