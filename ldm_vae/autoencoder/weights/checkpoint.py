"""An autoencoder in a checkpoint of its training run: the averaged weights, and what describes them.

    config.json, preprocessing.json    the network and its images, as in a diffusers folder of ours
    quantizer.json                     the shape of the quantizer beside it, where there is one
    tensors.safetensors                `ema.NAME` are the averaged weights, among the rest of the run's state

So a checkpoint's folder is read like any other folder of a VAE. Its scaling was never measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.codebooks import CONFIG as QUANTIZER
from ldm_vae.autoencoder.codebooks import beside
from ldm_vae.autoencoder.preparation import recorded
from ldm_vae.autoencoder.weights.files import Weights, open_weights
from ldm_vae.autoencoder.weights.networks import CONFIG
from ldm_vae.data import preprocessing

TENSORS = "tensors.safetensors"
AVERAGE = "ema"  # the averaged network's name in a checkpoint


def is_checkpoint(source: str | Path) -> bool:
    """True for the folder of a checkpoint."""
    return (Path(source) / TENSORS).is_file()


def describe(vae: Any, sample_size: int) -> dict[str, bytes]:
    """Files that make a checkpoint of `vae` readable as an autoencoder: its config, with the side of its images, and
    its record of preprocessing."""
    found, config = recorded(vae), json.loads(vae.to_json_string())
    if "sample_size" in config:  # an AutoencoderTiny has none
        config["sample_size"] = sample_size
    books = beside(vae)
    files = {} if books is None else {QUANTIZER: books.files()[QUANTIZER]}
    files |= {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    return files if found is None else files | {preprocessing.FILE: found.to_bytes()}


def open_averages(folder: Path, place: str) -> Weights:
    """The averaged weights in a checkpoint.

    Raises:
        UsageError: its file of tensors cannot be read.
    """
    weights = open_weights(folder / TENSORS, place)
    prefix = f"{AVERAGE}."
    averages = {name.removeprefix(prefix): one for name, one in weights.entries.items() if name.startswith(prefix)}
    return replace(weights, entries=averages, usual=("",))
