"""Export targets: what each program can load from one file, what it ignores, and the proof that it reads ours.

The facts were read in the programs' sources: ComfyUI `comfy/sd.py` (class VAE) and `comfy/latent_formats.py`; kohya
sd-scripts `library/model_util.py` (load_vae) and its constants; A1111 `modules/sd_vae.py` (a strict load_state_dict
into the checkpoint's own first stage); diffusers `loaders/single_file_model.py`.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import image_channels, latent_channels
from ldm_vae.autoencoder.ldm_network import LdmNetwork
from ldm_vae.autoencoder.single_file import has_attention_levels, is_sd_shape, load_single_file, save_single_file
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.text import an
from ldm_vae.core.validation import first_line
from ldm_vae.export.diffusers_folder import compare

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
class Reading:
    """A program's reading of a class: why it cannot load a config (None: it can), what it ignores of it (None:
    nothing), and where only some of its versions can load it, which (None: all)."""

    why_not: Callable[[Config], str | None] = lambda config: None
    ignores: Callable[[Config], str | None] = lambda config: None
    versions: Callable[[Config], str | None] = lambda config: None


@dataclass(frozen=True)
class Target:
    """A program that reads a VAE from one file: its `title`, and the classes that it reads."""

    title: str
    classes: Mapping[str, Reading]


def check_class(name: str, kind: str) -> None:
    """Raises UsageError where the target of that name reads no file of a class."""
    if kind in TARGETS[name].classes:
        return
    others = [other for other, target in TARGETS.items() if kind in target.classes]
    way = f"--target {' or '.join(others)} writes what is read" if others else "no program is known that reads one"
    raise UsageError(
        f"--target {name}: {TARGETS[name].title} reads no single file of {an(kind)}; {way}, --target diffusers a folder"
    )


def warnings_for(target: Target, config: Config, kind: str = "AutoencoderKL") -> list[str]:
    """Parts of a VAE of this class and config that the target cannot load or will ignore, a sentence each."""
    reading, found = target.classes[kind], []
    if (reason := reading.why_not(config)) is not None:
        found.append(f"{target.title} cannot load this file: {reason}")
    elif (versions := reading.versions(config)) is not None:
        found.append(f"{target.title}: {versions}")
    if (ignored := reading.ignores(config)) is not None:
        found.append(f"{target.title} ignores {ignored}")
    return found


def _ldm_scaling(config: Config) -> str | None:
    channels, scale = int(config["latent_channels"]), float(config["scaling_factor"])
    shift, mean = config.get("shift_factor"), config.get("latents_mean")
    if any(
        channels == width and abs(scale / factor - 1) < 1e-3 and offset == shift and mean is None
        for width, factor, offset in FAMILIES.values()
    ):
        return None
    ours = f"scaling_factor {scale:.5g}" + ("" if shift is None else f", shift_factor {shift:.5g}")
    ours += "" if mean is None else ", latents_mean and latents_std"
    theirs = ", ".join(f"{name} {width[1]:g}" for name, width in FAMILIES.items() if width[0] == channels)
    return f"the normalisation of this VAE ({ours}): it takes that of the diffusion model" + (
        f" ({theirs})" if theirs else ""
    )


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


def _flux2(config: Config) -> str | None:
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        return "without quant_conv and post_quant_conv it takes the file for another network, and leaves `bn` out"
    if config.get("decoder_block_out_channels") not in (None, config["block_out_channels"]):
        return "it builds a decoder of the encoder's widths"
    return _comfyui(config)


def _flux2_epsilon(config: Config) -> str | None:
    epsilon = float(config["batch_norm_eps"])
    return None if epsilon == 1e-4 else f"batch_norm_eps {epsilon:g} of this VAE: its own is 0.0001"


def _wan(config: Config) -> str | None:
    """Wan 2.1's network, which is Qwen-Image's too, of any width; 2.2's at its one size."""
    wanted: dict[str, Any] = {
        "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True],
    }  # fmt: skip
    if config.get("is_residual"):
        wanted |= {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12}
        wanted |= {"patch_size": 2}
    else:
        wanted |= {"z_dim": 16, "decoder_base_dim": (None, config["base_dim"]), "patch_size": (None, 1)}
        wanted |= {"out_channels": (None, config.get("in_channels"))}
    return _other(config, wanted)


def _wan_versions(config: Config) -> str | None:
    if config.get("is_residual") or (config["base_dim"] == 96 and config.get("in_channels", 3) == 3):
        return None
    return "a width other than 96, or image channels other than 3, are read by version 0.8.0, not by 0.3.64"


def _wan_statistics(config: Config) -> str | None:
    published = inspect.signature(AutoencoderKLWan.__init__).parameters
    if all(list(config[name]) == published[name].default for name in ("latents_mean", "latents_std")):
        return None
    whose = "Wan 2.2" if config.get("is_residual") else "Wan 2.1 and Qwen-Image"
    return f"latents_mean and latents_std of this VAE: it takes those of {whose}"


def _hunyuan_image(config: Config) -> str | None:
    wanted = {
        "latent_channels": 64, "block_out_channels": [128, 256, 512, 512, 1024, 1024], "layers_per_block": 2,
        "spatial_compression_ratio": 32, "in_channels": 3, "out_channels": 3, "downsample_match_channel": True,
        "upsample_match_channel": True,
    }  # fmt: skip
    return _other(config, wanted)


def _hunyuan_scaling(config: Config) -> str | None:
    scale = config["scaling_factor"]
    if scale is not None and abs(scale / 0.75289 - 1) < 1e-3:
        return None
    return f"scaling_factor {scale} of this VAE: it takes 0.75289"


def _other(config: Config, wanted: Mapping[str, Any]) -> str | None:
    """The first field of a config that is not what a program builds; a tuple is a choice, a list a list."""
    for name, value in wanted.items():
        came = config.get(name)
        came = list(came) if isinstance(came, tuple) else came
        if came not in (value if isinstance(value, tuple) else (value,)):
            return f"it builds {name} {value[-1] if isinstance(value, tuple) else value}, this VAE has {came}"
    return None


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


def _single_file(config: Config) -> str | None:
    return "it leaves out the attention outside of the middle block" if has_attention_levels(config) else None


TARGETS: Mapping[str, Target] = {
    "comfyui": Target(
        "ComfyUI",
        {
            "AutoencoderKL": Reading(_comfyui, _ldm_scaling, _comfyui_versions),
            "AutoencoderKLFlux2": Reading(
                _flux2, _flux2_epsilon, lambda _: "FLUX.2's VAE needs version 0.3.72 or later"
            ),
            "AutoencoderKLWan": Reading(_wan, _wan_statistics, _wan_versions),
            "AutoencoderKLQwenImage": Reading(_wan, _wan_statistics, _wan_versions),
            "AutoencoderKLHunyuanImage": Reading(_hunyuan_image, _hunyuan_scaling),
        },
    ),
    "kohya": Target("kohya sd-scripts", {"AutoencoderKL": Reading(_kohya, _ldm_scaling)}),
    "a1111": Target("A1111", {"AutoencoderKL": Reading(_a1111, _ldm_scaling)}),
    # the config, normalisation and all, is given beside the file
    "single_file": Target(
        "diffusers' from_single_file",
        {"AutoencoderKL": Reading(_single_file), "AutoencoderKLWan": Reading(), "AutoencoderDC": Reading()},
    ),
}


def write_target(vae: Any, path: Path, *, half: bool = False, name: str = "comfyui") -> float | None:
    """Write the file that the target `name` reads, in fp16 if `half`, and read it: again as we do, then as diffusers or
    LDM's programs do. `vae` is what `configured_copy` gave; if `half`, its weights are rounded to fp16 afterwards.

    Returns:
        of LDM's layout, the largest difference of moments and pixels, relative to the largest of them (rounding only).

    Raises:
        WorkError: the file does not encode or decode as the model does; it is removed.
        UsageError: diffusers' loader does not take a network of this shape; the file is removed.
    """
    save_single_file(vae.half() if half else vae, path)
    try:
        compare(vae, load_single_file(path))
        if name == "single_file":
            _compare_in_diffusers(vae, path)
        if type(vae).__name__ not in ("AutoencoderKL", "AutoencoderKLFlux2"):
            return None
        # compared in fp32: with `half` the weights are rounded already, and the same on both sides
        difference = max(_differences(vae.float(), load_file(path)))
        if not difference <= TOLERANCE:
            raise WorkError(f"{path}: read by LDM's names it differs from the model by {difference:.3g}; not written")
    except (UsageError, WorkError):
        path.unlink()
        raise
    return difference


def _compare_in_diffusers(vae: Any, path: Path) -> None:
    """Load the file with diffusers' own converter, whose names are fixed for some depths and widths."""
    kind = type(vae)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_config(folder)
        try:
            # a dtype is named only where it is a half: diffusers warns of every dtype that it is given
            dtype = {} if vae.dtype == torch.float32 else {"torch_dtype": vae.dtype}
            loaded = kind.from_single_file(str(path), config=folder, local_files_only=True, **dtype)
            compare(vae, loaded)
        except Exception as error:  # tensors that it misses or does not know end in any kind
            raise UsageError(
                f"--target single_file: {kind.__name__}.from_single_file does not take a network of this shape: "
                f"{first_line(error)}; --target diffusers writes a folder, which it does"
            ) from error


@torch.no_grad()
def _differences(vae: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Relative differences of moments and of pixels between a file, read by LDM's network, and the model."""
    draw = torch.Generator().manual_seed(0)
    # FLUX.2's quant convs stand inside encoder and decoder; ComfyUI takes them out, too
    tensors = {re.sub(r"^(en|de)coder\.(?=(post_)?quant_conv\.)", "", name): one for name, one in tensors.items()}
    network = LdmNetwork(tensors, int(vae.config.norm_num_groups))
    # the smallest image that every downsampling divides, times two
    side = 2 ** len(vae.config.block_out_channels)
    pixels = torch.rand(1, image_channels(vae), side, side, generator=draw) * 2 - 1
    z = torch.randn(1, latent_channels(vae), 4, 4, generator=draw)
    moments = vae.encode(pixels).latent_dist.parameters
    return _relative(network.encode(pixels), moments), _relative(network.decode(z), latents.decode(vae, z))


def _relative(came: torch.Tensor, expected: torch.Tensor) -> float:
    return float((came - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
