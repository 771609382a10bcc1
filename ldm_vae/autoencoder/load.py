"""Loading of an autoencoder from anywhere: folders, single files, a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.finite import check_weights
from ldm_vae.autoencoder.weights.files import print_note
from ldm_vae.autoencoder.weights.networks import (
    CLASSES,
    CONFIG,
    find_folder,
    load_folder,
)
from ldm_vae.data.preprocessing import read_beside, read_hub, record


def load_autoencoder(source: str | Path, config: str | Path | None = None) -> Any:
    """Load a VAE (an AutoencoderKL, VQModel or AutoencoderTiny) for inference: fp32, eval mode, no gradients; with the
    record of its preprocessing, if it has one (ldm_vae/data/preprocessing.py).

    What had to be done for it (a prefix taken from names, a variant in the place of full weights, 8-bit floats) is said
    on stderr.

    Args:
        source: a diffusers folder, a pipeline folder with `vae/`, a run folder (its exported `vae/`), a single
            `.safetensors` file, or a hub id (of a VAE or of a pipeline).
        config: for a single file of another shape than it tells by itself, a folder that holds its config.json.

    Raises:
        UsageError: `source` is none of these, or not whole, or its weights hold NaN or infinity, or its record is
            damaged or too new; the sentence names the file or the tensors.

    >>> from ldm_vae import load_autoencoder
    >>> vae = load_autoencoder("my-vae")
    >>> type(vae).__name__, vae.config.latent_channels
    ('AutoencoderKL', 4)
    """
    path, place = Path(source), f"VAE {source}"
    if path.is_file():
        from ldm_vae.autoencoder.single_file import load_single_file

        vae = load_single_file(path, None if config is None else Path(config))
    else:
        if config is not None:
            print_note(f"{place}: its own config.json is taken; {config} is for single files")
        folder = find_folder(str(source), place)
        vae = load_folder(folder, place, CLASSES)
        local, subfolder = path.is_dir(), "vae" if folder.name == "vae" else None
        record(vae, read_beside(folder / CONFIG) if local else read_hub(str(source), subfolder))
    check_weights(vae, place)
    return vae.float().eval().requires_grad_(False)
