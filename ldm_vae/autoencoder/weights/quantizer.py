"""The quantizer beside a network, from the folder of its weights (ldm_vae/autoencoder/codebooks.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from ldm_vae.autoencoder.codebooks import CONFIG, NAME, WEIGHTS, Shape, put_beside
from ldm_vae.autoencoder.weights.files import Entry, Weights, open_weights
from ldm_vae.autoencoder.weights.networks import fill
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import first_line, parse_json


def load_beside(vae: Any, folder: Path, place: str, weights: Weights | None = None) -> None:
    """Put the quantizer of a folder beside its network, where the folder has one.

    Args:
        weights: those of a checkpoint, among which the quantizer's are; by default quantizer.safetensors.

    Raises:
        UsageError: its shape or its weights cannot be read, or are not of each other.
    """
    if not (folder / CONFIG).is_file():
        return
    try:
        tree = parse_json(read_bytes(folder / CONFIG))
    except (OSError, ValueError) as error:
        raise UsageError(f"{place}: {CONFIG} cannot be read: {first_line(error)}") from error
    shape = config.validate(Shape, tree, f"{place}: {CONFIG}")
    with init_empty_weights():
        books = shape.build()
    if books.state_dict():
        fill(books, open_weights(folder / WEIGHTS, f"{place}: {WEIGHTS}") if weights is None else weights)
    put_beside(vae, books)


def parted(weights: Weights) -> tuple[Weights, Weights]:
    """Weights of a checkpoint => those of the network, and those of the quantizer beside it."""
    own: Mapping[str, Entry] = {
        name.removeprefix(f"{NAME}."): one for name, one in weights.entries.items() if name.startswith(f"{NAME}.")
    }
    rest = {name: one for name, one in weights.entries.items() if not name.startswith(f"{NAME}.")}
    return replace(weights, entries=rest), replace(weights, entries=own, usual=("",))
