"""Loading of an autoencoder from anywhere: folders, single files, a hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_vae.autoencoder.fine_tuning import encoder_parts
from ldm_vae.autoencoder.finite import check_weights
from ldm_vae.autoencoder.normalisation_law import take_away
from ldm_vae.autoencoder.preparation import record
from ldm_vae.autoencoder.weights.checkpoint import is_checkpoint, open_averages
from ldm_vae.autoencoder.weights.files import Entry
from ldm_vae.autoencoder.weights.networks import (
    CONFIG,
    build,
    fill,
    find_folder,
    is_dac,
    load_folder,
    read_config,
)
from ldm_vae.autoencoder.weights.quantizer import load_beside, parted
from ldm_vae.autoencoder.weights.transformers_dac import load_dac
from ldm_vae.core.config_file import read_yaml
from ldm_vae.core.errors import UsageError
from ldm_vae.core.frozen_module import without_graphs
from ldm_vae.core.terminal import print_note
from ldm_vae.data.preprocessing import read_beside, read_hub


def load_autoencoder(source: str | Path, config: str | Path | None = None) -> Any:
    """Load a VAE, any autoencoder of images that diffusers has, for inference: fp32, eval mode, no gradients; with the
    record of its preprocessing, if it has one (ldm_vae/data/preprocessing.py).

    What had to be done for it (a prefix taken from names, a variant in the place of full weights, 8-bit floats) is said
    on stderr.

    Args:
        source: a diffusers folder, a pipeline folder with `vae/`, a run folder (its exported `vae/`), the folder of a
            run's checkpoint (its averaged weights; scaling_factor is 0, since it was never measured), a folder of
            transformers' DacModel, a single `.safetensors` file, or a hub id (of a VAE or of a pipeline).
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
        if is_checkpoint(folder):
            vae = _load_checkpoint(folder, place)
        elif is_dac(described := read_config(folder / CONFIG, place)):
            vae = load_dac(folder, described, place)
        else:
            vae = load_folder(folder, place)
        local, subfolder = path.is_dir(), "vae" if folder.name == "vae" else None
        record(vae, read_beside(folder / CONFIG) if local else read_hub(str(source), subfolder))
        if not is_checkpoint(folder):
            load_beside(vae, folder, place)
    check_weights(vae, place)
    return without_graphs(vae.float().eval().requires_grad_(False))


def _load_checkpoint(folder: Path, place: str) -> Any:
    """The averaged weights in a checkpoint. A run that trained the decoder alone, from a store, held no encoder: it is
    that of the config's init_from."""
    averages, quantizer = parted(open_averages(folder, place))
    entries = dict(averages.entries)
    network = build(read_config(folder / CONFIG, place), place)
    ahead = tuple(f"{name}." for name in encoder_parts(network))
    if not any(name.startswith(ahead) for name in entries):
        base = read_yaml(folder / "config.yaml").get("init_from")
        if not isinstance(base, str):
            raise UsageError(f"{place}: holds no encoder, and its config.yaml names no init_from that has it")
        print_note(f"{place}: trained without its encoder, which is that of {base}")
        for name, value in load_autoencoder(base).state_dict().items():
            entries.setdefault(name, Entry(tuple(value.shape), lambda value=value: value))  # type: ignore[misc]
    fill(network, replace(averages, entries=entries))
    load_beside(network, folder, place, quantizer)
    take_away(network)
    return network.eval()
