"""Runs without values: shapes, and which layer or parameter takes part, on tensors of device `meta`."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily


def without_values(vae: Any) -> Any:
    """A network of the same class and config, for use in `on_meta`; of one that has no config of
    diffusers', a copy."""
    if not hasattr(vae, "from_config"):
        return copy.deepcopy(vae).to("meta") if isinstance(vae, nn.Module) else vae
    # a config also holds what diffusers notes for itself, of which it warns when it is given back
    taken = inspect.signature(type(vae).__init__).parameters
    config = {name: value for name, value in vae.config.items() if name in taken}
    try:
        return type(vae).from_config(config).eval().to("meta")  # also buffers that are constants of a module
    except RuntimeError:  # it reads a value while it is built (AutoencoderVidTok's levels)
        with torch.device("cpu"):
            return type(vae).from_config(config).eval().to("meta")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Around tensors without values, also where a caller's tensors are fake; the global random state stays."""
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily(), torch.device("meta"):
        yield
