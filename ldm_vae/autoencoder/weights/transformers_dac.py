"""A transformers.DacModel from its folder: the network as DacAutoencoder, its codes as the residual codebooks beside it
(ldm_vae/autoencoder/dac.py). Weights are plain, as transformers saves them, without weight norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ldm_vae.autoencoder.codebooks import Shape, put_beside
from ldm_vae.autoencoder.dac import SHAPE
from ldm_vae.autoencoder.weights.files import Entry, Weights, open_weights
from ldm_vae.autoencoder.weights.networks import DAC, build, fill
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError

_SIZES = {"codebooks": "n_codebooks", "codes": "codebook_size", "code_dim": "codebook_dim"}


def load_dac(folder: Path, described: Mapping[str, Any], place: str) -> Any:
    """The autoencoder of a folder whose config.json, `described`, is that of a DacModel.

    Raises:
        UsageError: it has an odd stride, or its weights are not of its config.
    """
    strides = described.get("downsampling_ratios", ())
    if odd := [stride for stride in strides if stride % 2]:
        raise UsageError(
            f"{place}: a DacModel with the odd stride {odd[0]} gives fewer samples than it takes; expected even "
            "strides, as descript/dac_44khz has"
        )
    network = build({"_class_name": "DacAutoencoder", **{name: described.get(name) for name in SHAPE}}, place)
    weights = open_weights(folder / DAC, place)
    own = {name: one for name, one in weights.entries.items() if not name.startswith("quantizer.")}
    fill(network, Weights(place, own, usual=("",)))
    channels = int(network.config.encoder_hidden_size) * 2 ** len(strides)
    sizes = {name: described.get(theirs) for name, theirs in _SIZES.items()}
    tree = {"kind": "residual", "channels": channels, "distance": "cosine", **sizes}
    shape = config.validate(Shape, tree, f"{place}: config.json")
    with init_empty_weights():
        books = shape.build()
    fill(books, Weights(place, _books(weights.entries, shape.codebooks), usual=("",)))
    return put_beside(network.eval(), books)


def _books(entries: Mapping[str, Entry], count: int) -> dict[str, Entry]:
    """Entries of ResidualCodebooks."""
    levels = [f"quantizer.quantizers.{level}." for level in range(count)]
    found = {}
    for level, name in enumerate(levels):
        for ours, theirs in (("into", "in_proj"), ("out", "out_proj")):
            for part in ("weight", "bias"):
                if (entry := entries.get(f"{name}{theirs}.{part}")) is not None:  # a convolution of one position
                    found[f"{ours}.{level}.{part}"] = Entry(
                        entry.shape[:2], _reader([entry], lambda one: one[0].squeeze(-1))
                    )
    rows = [entries[f"{name}codebook.weight"] for name in levels if f"{name}codebook.weight" in entries]
    if rows:
        found["rows"] = Entry((len(rows), *rows[0].shape), _reader(rows, torch.stack))
    return found


def _reader(
    entries: Sequence[Entry], joined: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    return lambda: joined([entry.read() for entry in entries])
