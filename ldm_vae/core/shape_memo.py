"""Operations on tensors without values, of device `meta` or fake, each worked out once for arguments of its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_KNOWN: dict[Any, Any] = {}  # what an operation made of its arguments, for `_made`; None where it is asked each time


class ShapeMemo(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, an operation that only makes tensors is asked for their shapes once and looked up afterwards: torch works
    them out in Python, 0.1 to 3 ms each, and a network repeats few of them (a run of Wan's tiny network: 60 ms, not
    330). What views, writes or has values is left to torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            key = (func, _told(args), _told(tuple(kwargs.items())))
            known = _KNOWN.get(key)
        except TypeError:  # a value, or an argument that has no hash
            return func(*args, **kwargs)
        if known:
            return _made(known)
        out = func(*args, **kwargs)
        if key not in _KNOWN:
            _KNOWN[key] = _described(out, {_storage(one) for one in _tensors((args, *kwargs.values()))})
        return out


def _told(value: Any) -> Any:
    """A part of a key: of a tensor its metadata. Raises TypeError where that is not all there is to it."""
    if isinstance(value, list | tuple):
        return tuple(map(_told, value))
    if not isinstance(value, torch.Tensor):
        return (type(value), value)  # 1, 1.0 and True are equal
    if not _without_values(value):
        raise TypeError("it has values")
    return (value.shape, value.stride(), value.dtype, value.device)


def _without_values(tensor: torch.Tensor) -> bool:
    return tensor.constant is None if isinstance(tensor, FakeTensor) else tensor.is_meta


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for one in values:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _described(out: Any, given: set[int]) -> Any:
    """An output as `_made` makes it again; None of one that is no tensor without values, or no new one: its storage is
    one of `given`, of the arguments, which of a view (`_unsafe_view`) the operation's schema need not say."""
    if isinstance(out, list | tuple):
        each = [_described(one, given) for one in out]
        return (type(out), each) if all(each) else None
    if out is None:  # a gradient that nobody asked for
        return (None, None)
    if not isinstance(out, torch.Tensor) or not _without_values(out) or _storage(out) in given:
        return None
    return (torch.Tensor, (out.shape, out.stride(), out.dtype, out.device))


def _made(known: Any) -> Any:
    kind, what = known
    if kind is torch.Tensor:
        shape, stride, dtype, device = what
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return None if kind is None else kind(map(_made, what))
