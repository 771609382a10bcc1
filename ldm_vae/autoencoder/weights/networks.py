"""A network of diffusers from its folder: config.json and weights, each looked at before anything is built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.models import autoencoders
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ldm_vae.autoencoder.causal_oobleck import CausalOobleck
from ldm_vae.autoencoder.codebooks import CONFIG as QUANTIZER
from ldm_vae.autoencoder.codebooks import WEIGHTS as BOOKS
from ldm_vae.autoencoder.dac import DacAutoencoder
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.weights import rounding
from ldm_vae.autoencoder.weights.files import (
    STEM,
    VARIANTS,
    Weights,
    export_command,
    open_folder,
    read_index,
    refuse_disguise,
)
from ldm_vae.autoencoder.weights.names import fit
from ldm_vae.core import hub
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.terminal import print_note
from ldm_vae.core.text import an
from ldm_vae.core.validation import check_model_config, first_line, parse_json

CONFIG = "config.json"
DAC = "model.safetensors"  # weights of a DacModel of transformers
OURS = (CausalOobleck, DacAutoencoder)  # autoencoders of this package


def load_folder(folder: Path, place: str, classes: Mapping[str, Any] | None = None) -> Any:
    """The network of a diffusers folder, of the class that its config.json names, in eval mode.

    Args:
        place: opens every sentence ("VAE my-vae").
        classes: those that it may be of; an autoencoder of images by default.

    Raises:
        UsageError: the folder does not hold such a network, whole; the sentence names the file or the tensors.
    """
    network = build(read_config(folder / CONFIG, place), place, classes)
    fill(network, open_folder(folder, place))
    return network.eval()


def read_config(path: Path, place: str) -> dict[str, Any]:
    """A model's config.json. Raises UsageError where it is none."""
    refuse_disguise(path, place)
    try:
        config = parse_json(read_bytes(path))
        check_model_config(config)
    except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
        raise UsageError(f"{place}: {path.name} is no model's config: {first_line(error)}") from error
    return dict(config)


def class_of(config: Mapping[str, Any], place: str, classes: Mapping[str, Any] | None = None) -> Any:
    """The class that a config is of; AutoencoderKL where it names none and has one's widths.

    Raises:
        UsageError: it is of another class, or nothing in it says of which.
    """
    name = config.get("_class_name", "AutoencoderKL" if "block_out_channels" in config else None)
    found = None
    if isinstance(name, str):
        found = _autoencoder(name) if classes is None else classes.get(name)
    if found is None:
        told = f"its {CONFIG} says {name}" if name is not None else f"its {CONFIG} names no class (_class_name)"
        expected = "an autoencoder of diffusers" if classes is None else f"one of {', '.join(classes)}"
        raise UsageError(f"{place}: expected {expected}, {told}")
    if classes is None and not (family := family_of(found)).is_served:
        told = family.refusal or "one of something else"
        raise UsageError(
            f"{place}: expected an autoencoder of images, clips or sounds, got {an(name)}, which is {told}"
        )
    if config.get("quantization_config"):
        raise UsageError(
            f"{place}: its {CONFIG} has a quantization_config: quantised weights are not read; give the weights that "
            "they were made from"
        )
    return found


def _autoencoder(name: str) -> Any:
    """The autoencoder class of that name: diffusers', ours, else one that a module of the user's own has defined by
    now; None where there is none."""
    found = getattr(autoencoders, name, {one.__name__: one for one in OURS}.get(name))
    if isinstance(found, type):
        return found
    return next(
        (model for model in _subclasses(ModelMixin) if model.__name__ == name and hasattr(model, "encode")), None
    )


def _subclasses(model: Any) -> Iterator[Any]:
    for one in model.__subclasses__():
        yield one
        yield from _subclasses(one)


def is_dac(config: Mapping[str, Any]) -> bool:
    """True for the config.json of a DacModel of transformers, which `transformers_dac` reads."""
    return config.get("model_type") == "dac"


def build(config: Mapping[str, Any], place: str, classes: Mapping[str, Any] | None = None) -> Any:
    """The network of a config, without values. Raises UsageError for a config of nothing."""
    model = class_of(config, place, classes)
    try:
        # no values yet: neither time nor memory for a config whose weights may not fit
        with init_empty_weights():
            return model.from_config(dict(config))
    except Exception as error:  # what a hostile config makes of diffusers: any kind
        raise UsageError(f"{place}: {CONFIG} describes no {model.__name__}: {first_line(error)}") from error


def fill(network: torch.nn.Module, weights: Weights) -> None:
    """Give a network of `build` its values; what was done to names, and what 8-bit floats cost, is said on stderr.

    Raises:
        UsageError: the weights do not fit.
    """
    fitted = fit(network, weights)
    # assign: the tensors of the file become the parameters, nothing is copied
    network.load_state_dict(fitted.state, strict=True, assign=True)
    for note in fitted.notes:
        print_note(note)
    if fitted.rounded:
        network.float().eval().requires_grad_(False)
        print_note(f"{weights.place}: {rounding.cost(network, fitted.rounded)}")


# --- where a VAE's folder is ------------------------------------------------------------------------------------------


def find_folder(source: str, place: str) -> Path:
    """The folder that holds a VAE's config.json: `source`, its vae/ (a pipeline's or a run's), or the hub's copy of it.

    Raises:
        UsageError: there is none; what is there is named.
    """
    path = Path(source)
    if not path.is_dir():
        return _fetched(source, place)
    folders = [folder for folder in (path, path / "vae") if (folder / CONFIG).exists()]
    # both have a config.json: a pipeline's own is no autoencoder's, its vae/ is
    if len(folders) == 2 and not _is_autoencoder(path):
        return folders[1]
    if folders:
        _note_age(path, folders[0], place)
        return folders[0]
    parts = sorted(part.parent for part in path.glob(f"*/{CONFIG}") if _is_autoencoder(part.parent))
    if parts:
        hint = f"; give {parts[0]}, which holds one"
    elif saved := sorted(one.parent for one in path.glob(f"checkpoints/*/{CONFIG}")):
        hint = (
            "; the run has no vae/, which is written at its end, but checkpoints: --checkpoint best, last or N takes "
            f"one, and so does its folder in the place of the run's ({saved[-1]})"
        )
    elif (path / "state.json").exists():
        hint = "; the checkpoint is a diffusion model's, or an older version of ldm-vae wrote it: the run's next has it"
    elif (path / "config.yaml").exists():
        hint = (
            "; the run has neither ended (its vae/ is written then) nor saved a checkpoint of an autoencoder: the "
            "training command, given again, goes on"
        )
    elif weights := sorted(path.glob("*.safetensors")):
        hint = f"; for weights alone give the file {weights[0]}"
    else:
        hint = ""
    raise UsageError(f"{place}: expected {CONFIG} in the folder or in its vae/, found neither{hint}")


def _note_age(run: Path, folder: Path, place: str) -> None:
    """Say that a run went on after its vae/ was written, and has not ended again."""
    written = (folder / CONFIG).stat().st_mtime
    later = [one.parent.name for one in run.glob(f"checkpoints/*/{CONFIG}") if one.stat().st_mtime > written]
    if later:
        print_note(f"{place}: its vae/ is older than its checkpoint {max(later)}, which --checkpoint last takes")


def _is_autoencoder(folder: Path) -> bool:
    try:
        class_of(read_config(folder / CONFIG, ""), "")
    except UsageError:
        return False
    return True


def _fetched(hub_id: str, place: str) -> Path:
    """The hub's copy in its cache: config.json, and the first weights of those that `open_folder` would take."""
    hub.check_id(hub_id, place)
    silent = hub.connect()
    try:
        folder = _fetched_config(hub_id)
        inside = "vae/" if folder.name == "vae" else ""
        for name in (QUANTIZER, BOOKS):  # before the weights: a hub that cannot be reached then ends the load
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(hub_id, f"{inside}{name}")
        # one set of weights, the first that the hub has: a repository may hold several variants
        dac = is_dac(read_config(folder / CONFIG, place))
        for weights in [DAC] if dac else _candidates():
            try:
                hf_hub_download(hub_id, f"{inside}{weights}")
            except EntryNotFoundError:
                continue
            if weights.endswith(".json"):
                for shard in read_index(folder / weights, place):
                    hf_hub_download(hub_id, f"{inside}{shard}")
            return folder
    except UsageError:
        raise
    except Exception as error:  # of the hub, the network and the cache: any kind
        raise UsageError(f"{place}: cannot be loaded from the hub: {hub.failure(error, hub_id, silent)}") from error
    raise UsageError(
        f"{place}: cannot be loaded from the hub: neither it nor, offline, its cache has {inside}{STEM}.safetensors, "
        f"its shards or a variant of it ({', '.join(VARIANTS)}); a pickle there is not read: download the .bin, and "
        f"{export_command(Path('FILE.bin'))} makes a safe folder of it"
    )


def _fetched_config(hub_id: str) -> Path:
    """A pipeline has its own in vae/."""
    try:
        folder = Path(hf_hub_download(hub_id, CONFIG)).parent
    except EntryNotFoundError:
        return Path(hf_hub_download(hub_id, f"vae/{CONFIG}")).parent
    if not _is_autoencoder(folder):
        try:
            return Path(hf_hub_download(hub_id, f"vae/{CONFIG}")).parent
        except EntryNotFoundError:
            pass
    return folder


def _candidates() -> list[str]:
    """Names of weights on a hub, in the order of `open_folder`."""
    named = [f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"]
    for variant in VARIANTS:
        named += [f"{STEM}.{variant}.safetensors", f"{STEM}.safetensors.index.{variant}.json"]
    return named
