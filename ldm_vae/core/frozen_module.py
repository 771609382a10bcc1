"""Frozen networks inside terms: moved with the device, kept in fp32, and absent from every state dict.

A checkpoint of a run should not carry VGG, and `model.half()` should not round a teacher. And networks without graphs,
which can be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """Holds `network` past nn.Module's registry: no parameters, no state, but `.to(device)` moves it."""

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["network"] = network.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Frozen:
        # where the others go it goes too, whatever type they become
        here = next(self.network.parameters()).device
        self.network.to(fn(torch.empty(0, device=here)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def without_graphs(module: Any) -> Any:
    """The same module, of whose layers no plain attribute holds a graph: the weight that torch.nn.utils.weight_norm
    makes anew at each call does, and such a module cannot be copied."""
    for part in module.modules():
        for name, value in [*vars(part).items()]:
            if torch.is_tensor(value) and not value.is_leaf:
                vars(part)[name] = value.detach()
    return module
