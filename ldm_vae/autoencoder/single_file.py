"""Single files: read an autoencoder from a .safetensors file of any layout, and write one in its class's.

Read: the layout of the class (weights/layouts.py), bare or prefixed (`first_stage_model.`, `vae.`: only these tensors
of a full checkpoint are read), and the names of diffusers. The shape comes from a config folder, else from our own
header, else, of LDM's layout, from the tensors, so no hub is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ldm_vae.autoencoder.preparation import record, recorded
from ldm_vae.autoencoder.weights import layouts, ldm_keys, networks
from ldm_vae.autoencoder.weights.files import (
    STEM,
    Weights,
    few,
    open_weights,
)
from ldm_vae.autoencoder.weights.names import find_autoencoder
from ldm_vae.autoencoder.weights.networks import build, fill
from ldm_vae.autoencoder.weights.shape import Shapes, infer_config
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.terminal import print_note
from ldm_vae.core.validation import check_model_config, first_line, parse_json
from ldm_vae.data import preprocessing

CONFIG_KEY = "ldm_vae.core.config"  # in the header of our own files: the diffusers config, so that nothing is inferred

# what the header of a full checkpoint says about its scaling, by a tensor that only that family has
_PUBLISHED: Mapping[str, tuple[float, float | None]] = {
    "conditioner.embedders.1.model.ln_final.weight": (0.13025, None),  # SDXL
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (1.5305, 0.0609),  # SD3
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (0.3611, 0.1159),  # FLUX
    "model.diffusion_model.input_blocks.0.0.weight": (0.18215, None),  # SD 1 and 2; SDXL has it too, hence last
}
SD_SCALING = 0.18215


def load_single_file(path: Path, config: Path | None = None, *, allow_pickle: bool = False) -> Any:
    """Load a VAE from one file, in the file's dtype: an AutoencoderKL, or what `config` is of.

    Args:
        path: a .safetensors file: a VAE alone or a full checkpoint.
        config: a folder with the diffusers config.json of its shape and scaling, or that file.
        allow_pickle: read an old .ckpt or .pt file too, tensors only (torch.load with weights_only=True).

    Raises:
        UsageError: the file cannot be read, holds no KL autoencoder, or one of another shape than `config` says.
    """
    try:
        return _load(path, config, allow_pickle)
    except UsageError:
        raise
    except Exception as error:  # names and shapes that no autoencoder has: any kind
        raise UsageError(f"VAE {path}: cannot be read as a KL autoencoder: {first_line(error)}") from error


def _load(path: Path, config: Path | None, allow_pickle: bool) -> Any:
    place = f"VAE {path}"
    if path.suffix == ".json":
        raise UsageError(f"{place}: expected a file of weights; for a config.json or an index give its folder")
    beside = path.with_name("config.json")
    if config is None and path.name.startswith(STEM) and beside.is_file():
        config = beside  # the weights of a diffusers folder, named without the folder
    given = None if config is None else read_config(config)
    weights = open_weights(path, place, allow_pickle=allow_pickle)
    if given is None and CONFIG_KEY in weights.header:
        given = _parse_config(weights.header[CONFIG_KEY], place)
    if given is None:
        given = _told_by(weights, path)
    vae = build(given, place if config is None else f"config {config}")
    fill(vae, weights)
    found = None if config is None else preprocessing.read_beside(config / "config.json" if config.is_dir() else config)
    if found is None and preprocessing.HEADER in weights.header:
        found = preprocessing.parse(
            weights.header[preprocessing.HEADER], f"{place}: {preprocessing.HEADER} in its header"
        )
    return record(vae.eval(), found)


def save_single_file(vae: Any, path: Path, prefix: str = "") -> Path:
    """Write the layout of a class in LAYOUTS; `prefix="first_stage_model."` as in a full checkpoint. Replaces `path` in
    one step."""
    tensors = {f"{prefix}{name}": value.detach().cpu().contiguous() for name, value in layouts.to_file(vae).items()}
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    config["_class_name"] = type(vae).__name__
    header = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    if (found := recorded(vae)) is not None:
        header[preprocessing.HEADER] = found.to_bytes().decode()
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=header)
        atomic_io.sync_readable(temporary)

    atomic_io.replace_by(path, write)
    return path


# --- the config -------------------------------------------------------------------------------------------------------


def read_config(config: Path) -> dict[str, Any]:
    """A diffusers config.json, from its folder, a pipeline folder with vae/, or the file itself. UsageError if none."""
    for file in (config, config / "config.json", config / "vae" / "config.json"):
        if file.is_file():
            return networks.read_config(file, f"config {config}")
    raise UsageError(f"config {config}: expected a folder with the config.json of an AutoencoderKL, found none")


def _parse_config(text: str, place: str) -> dict[str, Any]:
    try:
        parsed = parse_json(text)
        check_model_config(parsed)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(f"{place}: the config in its header cannot be taken: {first_line(error)}") from error
    return dict(parsed)


def _told_by(weights: Weights, path: Path) -> dict[str, Any]:
    """The config of a KL autoencoder, or FLUX.2's, from its tensors, so that no hub is asked; with a word where it is a
    guess."""
    if kinds := layouts.classes_told_by(list(weights.entries)):
        raise UsageError(
            f"{weights.place}: its tensors have the names of an {' or '.join(kinds)}, whose config they do not tell; "
            "give the folder of its config.json with --config FOLDER"
        )
    found = find_autoencoder(weights.entries)
    if found is None:
        raise UsageError(
            f"{weights.place}: holds no KL autoencoder: no tensor encoder.conv_in.weight, bare or behind "
            f"{' or '.join(filter(None, ldm_keys.PREFIXES))} (it begins with {few(sorted(weights.entries))})"
        )
    shapes: Shapes = {name: entry.shape for name, entry in found.items()}
    if ldm_keys.has_diffusers_names(shapes):
        blocks = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down_blocks.")})
        shapes = {ldm_keys.to_ldm_name(ldm_keys.current_name(name), blocks): shapes[name] for name in shapes}
    # FLUX.2's stand inside encoder and decoder
    shapes = {re.sub(r"^(en|de)coder\.(?=(post_)?quant_conv\.)", "", name): shape for name, shape in shapes.items()}
    config = infer_config(shapes, weights.place)
    if "bn.running_mean" in shapes:  # which is its normalisation
        return config | {"_class_name": "AutoencoderKLFlux2"}
    return config | _scaling(config, list(weights.entries), path)


def is_sd_shape(config: Mapping[str, Any]) -> bool:
    """True for the config of Stable Diffusion's VAE (SDXL's has the same shape), and of an AsymmetricAutoencoderKL with
    its encoder."""
    return (
        tuple(config.get("down_block_out_channels") or config.get("block_out_channels") or ()) == (128, 256, 512, 512)
        and config["latent_channels"] == 4
        and config.get("layers_per_block", config.get("layers_per_down_block")) == 2
        and (config["in_channels"], config["out_channels"], config["norm_num_groups"]) == (3, 3, 32)
        and all(config.get(name, True) for name in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"))
        and not has_attention_levels(config)
    )


def has_attention_levels(config: Mapping[str, Any]) -> bool:
    """True for a config with attention outside of the middle block."""
    blocks = (*config.get("down_block_types", ()), *config.get("up_block_types", ()))
    return any(name.startswith("Attn") for name in blocks)


def _scaling(config: Mapping[str, Any], names: list[str], path: Path) -> dict[str, float | None]:
    """Scaling that the file tells, with a word on stderr where it is a guess."""
    known = next((values for mark, values in _PUBLISHED.items() if mark in set(names)), None)
    if known is not None:
        return {"scaling_factor": known[0], "shift_factor": known[1]}
    if is_sd_shape(config):
        print_note(
            f"{path} has Stable Diffusion's shape: scaling_factor {SD_SCALING} is taken (SDXL's would be 0.13025)"
        )
        return {"scaling_factor": SD_SCALING}
    print_note(f"{path} does not say its scaling: scaling_factor is 1 until it is measured (`ldm-vae export --stats`)")
    return {"scaling_factor": 1.0}
