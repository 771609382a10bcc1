"""Runs without values: shapes, and which layer or parameter takes part, on tensors of device `meta`."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

from ldm_vae.autoencoder.codebooks import beside, put_beside
from ldm_vae.core.shape_memo import ShapeMemo

Found = TypeVar("Found")

# entries of a config that change no shape, and that every training and export sets
UNSHAPED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")

_SHARED: dict[Any, Any] = {}


def once(measure: Callable[..., Found]) -> Callable[..., Found]:
    """Remember what a run without values finds: for a network, and for all of its class and config."""
    known: WeakKeyDictionary[Any, dict[str, Found]] = WeakKeyDictionary()
    of_config: dict[tuple[Any, str], Found] = {}

    @functools.wraps(measure)
    def found(vae: Any, *arguments: Any) -> Found:
        books = beside(vae)  # may have come since
        key = repr((books and books.shape, arguments))
        mine = known.setdefault(vae, {})
        if key not in mine and hasattr(vae, "from_config"):
            of_all = (_class_and_config(vae), key)
            if of_all not in of_config:
                of_config[of_all] = measure(vae, *arguments)
            mine[key] = of_config[of_all]
        elif key not in mine:
            mine[key] = measure(vae, *arguments)
        return mine[key]

    return found


def _class_and_config(vae: Any) -> tuple[type, str]:
    shaped = {name: value for name, value in vae.config.items() if name not in UNSHAPED and name[0] != "_"}
    # as JSON, in which a config that was built and one that was read are the same: tuples come back as lists
    return type(vae), json.dumps(shaped, sort_keys=True, default=repr)


def shared_without_values(vae: Any) -> Any:
    """`without_values`, one for all measures of a class and config, which run it and change nothing of it: to build it
    takes as long as to run it."""
    if not hasattr(vae, "from_config"):
        return without_values(vae)
    books = beside(vae)
    key = (_class_and_config(vae), repr(books and books.shape))
    if key not in _SHARED:
        _SHARED.clear()  # a program measures one network, and then another
        _SHARED[key] = without_values(vae)
    return _SHARED[key]


def without_values(vae: Any) -> Any:
    """A network of the same class and config, for use in `on_meta`; of one that has no config of
    diffusers', a copy."""
    if not hasattr(vae, "from_config"):
        # all of it learns: what is found of it is remembered, what learns changes
        return copy.deepcopy(vae).to("meta").requires_grad_(True) if isinstance(vae, nn.Module) else vae
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
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily(), torch.device("meta"), ShapeMemo():
        yield


def leaves_of(*results: torch.Tensor) -> WeakIdKeyDictionary:
    """Parameters that a backward pass from these would reach, by a walk through their graph: half the time of a pass,
    and no thread of autograd's, which a process that is forked later must not have."""
    found, seen = WeakIdKeyDictionary(), set[Any]()
    nodes = [one.grad_fn for one in results if one.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[leaf] = True
        nodes += [after for after, _ in node.next_functions if after is not None]
    return found
