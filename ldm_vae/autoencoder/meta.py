"""Runs without values: shapes, and which layer or parameter takes part, on tensors of device `meta`."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ldm_vae.autoencoder.codebooks import beside, put_beside

Found = TypeVar("Found")


def once(measure: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Remember what a run without values finds: for a network, and for all of its class and config."""
    known: WeakKeyDictionary[Any, tuple[Any, Found]] = WeakKeyDictionary()
    of_config: dict[tuple[type, str], Found] = {}

    @functools.wraps(measure)
    def found(vae: Any) -> Found:
        books = beside(vae)  # may have come since
        shape = books and books.shape
        if vae in known and known[vae][0] == shape:
            return known[vae][1]
        if not hasattr(vae, "from_config"):
            known[vae] = (shape, measure(vae))
            return known[vae][1]
        key = (type(vae), repr((vae.config, shape)))
        if key not in of_config:
            of_config[key] = measure(vae)
        known[vae] = (shape, of_config[key])
        return of_config[key]

    return found


def without_values(vae: Any) -> Any:
    """A network of the same class and config, for use in `on_meta`; of one that has no config of
    diffusers', a copy."""
    if not hasattr(vae, "from_config"):
        return copy.deepcopy(vae).to("meta") if isinstance(vae, nn.Module) else vae
    # a config also holds what diffusers notes for itself, of which it warns when it is given back
    taken = inspect.signature(type(vae).__init__).parameters
    config = {name: value for name, value in vae.config.items() if name in taken}
    try:
        empty = type(vae).from_config(config)
    except RuntimeError:  # it reads a value while it is built (AutoencoderVidTok's levels)
        with torch.device("cpu"):
            empty = type(vae).from_config(config)
    books = beside(vae)
    # `to` also takes buffers that are constants of a module
    return put_beside(empty, None if books is None else books.shape.build()).eval().to("meta")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Around tensors without values, also where a caller's tensors are fake; the global random state stays."""
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily(), torch.device("meta"):
        yield
