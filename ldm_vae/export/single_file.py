"""Single files: read an autoencoder from a .safetensors file of any layout, and write one in LDM's layout.

Read: bare LDM, prefixed (`first_stage_model.`, `vae.`: only these tensors of a full checkpoint are read), and the names
of diffusers. The shape comes from a config folder, else from our own header, else from the tensors, so no hub is asked.

Legend: c latent channels, n resolutions (f = 2 ** (n - 1)).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm_vae import preprocessing, publish
from ldm_vae.errors import UsageError
from ldm_vae.export import ldm_keys
from ldm_vae.untrusted import check_model_config, first_line, parse_json

CONFIG_KEY = "ldm_vae.config"  # in the header of our own files: the diffusers config, so that nothing is inferred

# what the header of a full checkpoint says about its scaling, by a tensor that only that family has
_PUBLISHED: Mapping[str, tuple[float, float | None]] = {
    "conditioner.embedders.1.model.ln_final.weight": (0.13025, None),  # SDXL
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (1.5305, 0.0609),  # SD3
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (0.3611, 0.1159),  # FLUX
    "model.diffusion_model.input_blocks.0.0.weight": (0.18215, None),  # SD 1 and 2; SDXL has it too, hence last
}
SD_SCALING = 0.18215

Shapes = Mapping[str, tuple[int, ...]]


def load_single_file(path: Path, config: Path | None = None, *, allow_pickle: bool = False) -> AutoencoderKL:
    """Load an AutoencoderKL from one file, in the file's dtype.

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


def _load(path: Path, config: Path | None, allow_pickle: bool) -> AutoencoderKL:
    beside = path.with_name("config.json")
    if config is None and path.name.startswith("diffusion_pytorch_model") and beside.is_file():
        config = beside  # the weights of a diffusers folder, named without the folder
    given = None if config is None else read_config(config)
    tensors, header, shapes = _read(path, allow_pickle)
    blocks = sum(name.startswith(("encoder.down.", "encoder.down_blocks.")) for name in _stage_names(tensors))
    if ldm_keys.has_diffusers_names(tensors):
        tensors = ldm_keys.to_ldm({ldm_keys.current_name(name): value for name, value in tensors.items()}, blocks)
    if given is None and CONFIG_KEY in header:
        given = _parse_config(header[CONFIG_KEY], path)
    if given is None:
        given = infer_config({name: tuple(value.shape) for name, value in tensors.items()}, path)
        given |= _scaling(given, shapes, path)
    check_model_config(given)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(given)
    vae.load_state_dict(_fit(vae, tensors, path), strict=True, assign=True)
    found = None if config is None else preprocessing.read_beside(config / "config.json" if config.is_dir() else config)
    if found is None and preprocessing.HEADER in header:
        found = preprocessing.parse(header[preprocessing.HEADER], f"VAE {path}: {preprocessing.HEADER} in its header")
    return preprocessing.record(vae.eval(), found)


def save_single_file(vae: AutoencoderKL, path: Path, prefix: str = "") -> Path:
    """Write LDM's layout; `prefix="first_stage_model."` as in a full checkpoint. Replaces `path` in one step."""
    blocks = len(vae.config.block_out_channels)
    tensors = {
        f"{prefix}{name}": value.detach().cpu().contiguous()
        for name, value in ldm_keys.to_ldm(vae.state_dict(), blocks).items()
    }
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    header = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    if (found := preprocessing.recorded(vae)) is not None:
        header[preprocessing.HEADER] = found.to_bytes().decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, metadata=header)
        publish.settle(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, torch.Tensor], Mapping[str, str], list[str]]:
    """The autoencoder's tensors without prefix, the header's metadata, and the names of everything in the file."""
    header: dict[str, str]
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        everything, header = _read_pickle(path, allow_pickle), {}
        names = list(everything)
        prefix = _prefix(names, path)
        return {n.removeprefix(prefix): everything[n] for n in names if _is_ours(n, prefix)}, header, names
    try:
        with safe_open(path, framework="pt") as file:
            header, names = dict(file.metadata() or {}), list(file.keys())
            prefix = _prefix(names, path)
            wanted = [name for name in names if _is_ours(name, prefix)]
            return {name.removeprefix(prefix): file.get_tensor(name) for name in wanted}, header, names
    except (SafetensorError, OSError) as error:
        raise UsageError(f"VAE {path}: cannot be read as a safetensors file: {error}") from error


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not allow_pickle:
        raise UsageError(
            f"VAE {path}: is a pickle, which is not read unasked; `ldm-vae export {path} OUT --weights_only_pickle` "
            "reads its tensors and nothing else and writes a safe file"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of itself
        raise UsageError(f"VAE {path}: cannot be read as tensors alone: {first_line(error)}") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _prefix(names: list[str], path: Path) -> str:
    prefix = ldm_keys.find_prefix(names)
    if prefix is None:
        raise UsageError(
            f"VAE {path}: holds no KL autoencoder: no tensor encoder.conv_in.weight, bare or behind "
            f"{' or '.join(filter(None, ldm_keys.PREFIXES))} (it begins with {', '.join(sorted(names)[:3])})"
        )
    return prefix


def _is_ours(name: str, prefix: str) -> bool:
    return name.startswith(
        tuple(f"{prefix}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    )


def _stage_names(names: Mapping[str, Any]) -> set[str]:
    """`encoder.down.0`, `encoder.down.1`, ... (or `encoder.down_blocks.0`, ...)."""
    return {".".join(name.split(".")[:3]) for name in names}


def read_config(config: Path) -> dict[str, Any]:
    """A diffusers config.json, from its folder, a pipeline folder with vae/, or the file itself. UsageError if none."""
    for place in (config, config / "config.json", config / "vae" / "config.json"):
        if place.is_file():
            return _parse_config(place.read_text(encoding="utf-8"), place)
    raise UsageError(f"config {config}: expected a folder with the config.json of an AutoencoderKL, found none")


def _parse_config(text: str, source: Path) -> dict[str, Any]:
    try:
        parsed = parse_json(text)
    except ValueError as error:
        raise UsageError(f"config {source}: not readable as JSON: {error}") from error
    if not isinstance(parsed, dict) or "block_out_channels" not in parsed:
        raise UsageError(f"config {source}: not that of an AutoencoderKL (no block_out_channels)")
    return {name: value for name, value in parsed.items() if not name.startswith("_")}


# --- the shape, from the tensors --------------------------------------------------------------------------------------


def infer_config(shapes: Shapes, path: Path) -> dict[str, Any]:
    """The diffusers config of an autoencoder from its tensors' LDM names and shapes.

    The number of GroupNorm groups leaves no trace in a file: LDM's is 32, always. Raises UsageError when the tensors
    are not those of a KL autoencoder, or 32 does not divide its widths.
    """
    stages = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down.")})
    try:
        widths = [shapes[f"encoder.down.{stage}.block.0.conv1.weight"][0] for stage in stages]
        moments = shapes["quant_conv.weight" if "quant_conv.weight" in shapes else "encoder.conv_out.weight"][0]
        channels = shapes["decoder.conv_in.weight"][1]
        image = shapes["encoder.conv_in.weight"][1], shapes["decoder.conv_out.weight"][0]
    except KeyError as error:
        raise UsageError(f"VAE {path}: holds no whole KL autoencoder: tensor {error.args[0]} is missing") from error
    if moments != 2 * channels:
        raise UsageError(
            f"VAE {path}: the encoder gives {moments} channels for a decoder of {channels}; a KL autoencoder gives "
            "twice as many (is it a VQ model?)"
        )
    if not widths or any(width % 32 for width in widths):
        raise UsageError(
            f"VAE {path}: widths {widths} are not multiples of 32 groups, so its shape cannot be told from the file "
            "alone; give the folder of its config.json with --config FOLDER"
        )
    attention = [f"encoder.down.{stage}.attn.0.q.weight" in shapes for stage in stages]
    return {
        "in_channels": image[0],
        "out_channels": image[1],
        "latent_channels": channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": len({n.split(".")[4] for n in shapes if n.startswith("encoder.down.0.block.")}),
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)),
        "sample_size": 256,
    }


def is_sd_shape(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of Stable Diffusion's VAE (SDXL's has the same shape)."""
    return (
        tuple(config["block_out_channels"]) == (128, 256, 512, 512)
        and config["latent_channels"] == 4
        and config["layers_per_block"] == 2
        and (config["in_channels"], config["out_channels"], config["norm_num_groups"]) == (3, 3, 32)
        and bool(config["mid_block_add_attention"] and config["use_quant_conv"] and config["use_post_quant_conv"])
    )


def _scaling(config: Mapping[str, Any], names: list[str], path: Path) -> dict[str, float | None]:
    """What the file tells of the scaling, with a word on stderr where it is a guess."""
    known = next((values for mark, values in _PUBLISHED.items() if mark in set(names)), None)
    if known is not None:
        return {"scaling_factor": known[0], "shift_factor": known[1]}
    if is_sd_shape(config):
        _say(
            f"note: {path} has Stable Diffusion's shape: scaling_factor {SD_SCALING} is taken (SDXL's would be 0.13025)"
        )
        return {"scaling_factor": SD_SCALING}
    _say(f"note: {path} does not say its scaling: scaling_factor is 1 until it is measured (`ldm-vae export --stats`)")
    return {"scaling_factor": 1.0}


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


# --- the tensors, in diffusers' names ---------------------------------------------------------------------------------


def _fit(vae: AutoencoderKL, tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """LDM tensors as the state dict of `vae`. Raises UsageError naming what is missing, left over or misshapen."""
    blocks = len(vae.config.block_out_channels)
    state, left = {}, dict(tensors)
    for name, place in vae.state_dict().items():
        ldm_name = ldm_keys.to_ldm_name(name, blocks)
        if ldm_name not in left:
            raise UsageError(f"VAE {path}: tensor {ldm_name} is missing (diffusers' {name})")
        value = left.pop(ldm_name)
        if ldm_keys.is_attention_matrix(name) and value.numel() == place.numel():
            value = value.reshape(place.shape)
        if value.shape != place.shape:
            came, expected = tuple(value.shape), tuple(place.shape)
            raise UsageError(f"VAE {path}: tensor {ldm_name} is {came}, the config asks for {expected}")
        state[name] = value
    if left:
        raise UsageError(f"VAE {path}: tensor {min(left)} has no place in an AutoencoderKL of this config")
    return state
