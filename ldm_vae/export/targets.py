"""Export targets: what each program can load from one file, what it ignores, and the proof that it reads ours.

The facts were read in the programs' sources: ComfyUI `comfy/sd.py` (class VAE) and `comfy/latent_formats.py`; kohya
sd-scripts `library/model_util.py` (load_vae) and its constants; A1111 `modules/sd_vae.py` (a strict load_state_dict
into the checkpoint's own first stage).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import image_channels, latent_channels
from ldm_vae.autoencoder.ldm_network import LdmNetwork
from ldm_vae.autoencoder.single_file import has_attention_levels, is_sd_shape, save_single_file
from ldm_vae.core.errors import WorkError

Config = Mapping[str, Any]

TOLERANCE = 1e-3  # measured: 1e-6 to 1e-5 in fp32

# scaling_factor and shift_factor that the programs take from the diffusion model, never from a VAE's file
FAMILIES: Mapping[str, tuple[int, float, float | None]] = {
    "SD 1, SD 2": (4, 0.18215, None),
    "SDXL": (4, 0.13025, None),
    "SD3": (16, 1.5305, 0.0609),
    "FLUX": (16, 0.3611, 0.1159),
}


@dataclass(frozen=True)
class Target:
    """A program that reads a VAE from one file: its `title`, why it cannot load a config (None: it can), and where only
    some of its versions can, which (None: all)."""

    title: str
    why_not: Callable[[Config], str | None]
    versions: Callable[[Config], str | None] = lambda config: None


def warnings_for(target: Target, config: Config) -> list[str]:
    """Parts of a VAE of this config that the target cannot load or will ignore, a sentence each."""
    found = []
    reason = target.why_not(config)
    if reason is not None:
        found.append(f"{target.title} cannot load this file: {reason}")
    elif (versions := target.versions(config)) is not None:
        found.append(f"{target.title}: {versions}")
    channels, scale = int(config["latent_channels"]), float(config["scaling_factor"])
    shift, mean = config.get("shift_factor"), config.get("latents_mean")
    known = [
        family
        for family, (width, factor, offset) in FAMILIES.items()
        if channels == width and abs(scale / factor - 1) < 1e-3 and offset == shift and mean is None
    ]
    if not known:
        ours = f"scaling_factor {scale:.5g}" + ("" if shift is None else f", shift_factor {shift:.5g}")
        ours += "" if mean is None else ", latents_mean and latents_std"
        theirs = ", ".join(f"{name} {width[1]:g}" for name, width in FAMILIES.items() if width[0] == channels)
        found.append(
            f"{target.title} ignores the normalisation of this VAE ({ours}): it takes that of the diffusion model"
            + (f" ({theirs})" if theirs else "")
        )
    return found


def warnings_for_pipelines(config: Config) -> list[str]:
    """Parts of this config that the pipelines of diffusers for such latents ignore, a sentence each.

    Their `vae.decode(latents / scaling_factor)` knows shift_factor in SD3's and FLUX's pipelines only.
    """
    shift, channels = config.get("shift_factor"), config.get("latent_channels")
    takers = {name: offset for name, (width, _, offset) in FAMILIES.items() if width == channels}
    if not shift or not takers or any(offset is not None for offset in takers.values()):
        return []
    return [
        f"the pipelines of {', '.join(takers)}, whose latents have {channels} channels, ignore shift_factor without a "
        f"word: what they decode is off by {shift:.2g} in every latent; `--normalisation scale` is what they apply"
    ]


def _comfyui(config: Config) -> str | None:
    """Widths 128 x (1, 2, 4, 4) or, without a fourth resolution, (1, 2, 4); any latent channels but 64; the decoder
    may have another base width; quant convs both or neither."""
    widths = tuple(config["block_out_channels"])
    if int(config["latent_channels"]) == 64:
        return "it takes a file of 64 latent channels for another network"
    if widths not in ((128, 256, 512, 512), (128, 256, 512)):
        return f"it builds widths (128, 256, 512, 512) or (128, 256, 512), this VAE has {widths}"
    return _common(config)


def _comfyui_versions(config: Config) -> str | None:
    """v0.3.72 added FLUX.2, whose VAE has 32 channels too: since then a file of 32 channels is taken for Hunyuan's
    video VAE only if its convolutions are three-dimensional. FLUX.2's own file is told by bn.running_mean."""
    if int(config["latent_channels"]) != 32:
        return None
    return (
        "a file of 32 latent channels needs version 0.3.72 (2025-11-25) or later: those of the two months before take "
        "it for Hunyuan's video VAE and fail; and without bn.running_mean no version takes it for FLUX.2's"
    )


def _kohya(config: Config) -> str | None:
    if is_sd_shape(config) or _is_flux_shape(config):
        return None
    return "its shape is neither that of SD and SDXL (4 channels) nor that of SD3 and FLUX (16, no quant_conv)"


def _a1111(config: Config) -> str | None:
    return None if is_sd_shape(config) else "its shape is not that of SD and SDXL"


def _is_flux_shape(config: Config) -> bool:
    like_sd = {**config, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    quant = config["use_quant_conv"] or config["use_post_quant_conv"]
    return int(config["latent_channels"]) == 16 and not quant and is_sd_shape(like_sd)


def _common(config: Config) -> str | None:
    if int(config["layers_per_block"]) != 2:
        return f"it builds 2 residual blocks per resolution, this VAE has {config['layers_per_block']}"
    if not config["mid_block_add_attention"]:
        return "it builds attention in the middle block, this VAE has none"
    if has_attention_levels(config):
        return "it builds attention in the middle block only, this VAE has more"
    if bool(config["use_quant_conv"]) != bool(config["use_post_quant_conv"]):
        return "it expects quant_conv and post_quant_conv, or neither"
    if int(config["in_channels"]) != 3 or int(config["out_channels"]) != 3:
        return f"it expects 3 image channels, this VAE has {config['in_channels']}"
    if int(config["norm_num_groups"]) != 32:
        return f"it normalises in 32 groups, this VAE in {config['norm_num_groups']}"
    return None


TARGETS: Mapping[str, Target] = {
    "comfyui": Target("ComfyUI", _comfyui, _comfyui_versions),
    "kohya": Target("kohya sd-scripts", _kohya),
    "a1111": Target("A1111", _a1111),
}


def write_target(vae: AutoencoderKL, path: Path, *, half: bool = False) -> float:
    """Write the bare LDM file that all three programs read, in fp16 if `half`, and read it as they do. `vae` is what
    `configured_copy` gave; if `half`, its weights are rounded to fp16 afterwards.

    Returns:
        the largest difference of moments and pixels, relative to the largest of them (rounding only).

    Raises:
        WorkError: the file does not encode or decode as the model does; it is removed.
    """
    save_single_file(vae.half() if half else vae, path)
    # compared in fp32: with `half` the weights are rounded already, and the same on both sides
    difference = max(_differences(vae.float(), load_file(path)))
    if not difference <= TOLERANCE:
        path.unlink()
        raise WorkError(f"{path}: read by LDM's names it differs from the model by {difference:.3g}; not written")
    return difference


@torch.no_grad()
def _differences(vae: AutoencoderKL, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Relative differences of moments and of pixels between a file, read by LDM's network, and the model."""
    draw = torch.Generator().manual_seed(0)
    network = LdmNetwork(tensors, int(vae.config.norm_num_groups))
    # the smallest image that every downsampling divides, times two
    side = 2 ** len(vae.config.block_out_channels)
    pixels = torch.rand(1, image_channels(vae), side, side, generator=draw) * 2 - 1
    z = torch.randn(1, latent_channels(vae), 4, 4, generator=draw)
    moments = vae.encode(pixels).latent_dist.parameters
    return _relative(network.encode(pixels), moments), _relative(network.decode(z), latents.decode(vae, z))


def _relative(came: torch.Tensor, expected: torch.Tensor) -> float:
    return float((came - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
