"""The autoencoder: build one from a config, load one from anywhere, and the trainable wrapper with its one forward.

The trained module *is* diffusers' AutoencoderKL: no parallel network code, no conversion at export.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from pydantic import model_validator
from torch import nn

from ldm_vae import latents
from ldm_vae.config import Section
from ldm_vae.errors import UsageError
from ldm_vae.fine_tuning import encoder_learns
from ldm_vae.latents import Moments


class AutoencoderConfig(Section):
    """Shape of a KL autoencoder, in diffusers' names; f = 2 ** (number of widths - 1)."""

    in_channels: int = 3
    """Channels of an image."""
    latent_channels: int = 4
    """Channels c of the latent."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths per resolution, first to last; each step but the last halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks per resolution (the decoder has one more)."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""
    use_quant_conv: bool = True
    """A 1x1 convolution behind the encoder (SD, SDXL: yes; SD3, FLUX: no)."""
    use_post_quant_conv: bool = True
    """A 1x1 convolution before the decoder (SD, SDXL: yes; SD3, FLUX: no)."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        odd = [width for width in self.block_out_channels if width <= 0 or width % self.norm_num_groups]
        if odd or not self.block_out_channels:
            raise ValueError(
                f"block_out_channels: expected multiples of norm_num_groups {self.norm_num_groups}, got "
                f"{odd[0] if odd else 'none'}"
            )
        return self

    def build(self) -> AutoencoderKL:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        blocks = len(self.block_out_channels)
        return AutoencoderKL(
            **self.model_dump() | {"out_channels": self.in_channels},
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            scaling_factor=1.0,
        )


# --- loading ----------------------------------------------------------------------------------------------------------


def load_autoencoder(source: str | Path, config: str | Path | None = None) -> AutoencoderKL:
    """Load a VAE for inference: fp32, eval mode, no gradients.

    Args:
        source: a diffusers folder, a pipeline folder with `vae/`, a run folder (its exported `vae/`), a single
            `.safetensors` file, or a hub id (of a VAE or of a pipeline).
        config: for a single file of another shape than it tells by itself, a folder that holds its config.json.

    Raises:
        UsageError: `source` is none of these.
    """
    path = Path(source)
    if path.is_file():
        from ldm_vae.export.single_file import load_single_file

        vae = load_single_file(path, None if config is None else Path(config))
    else:
        vae = _from_pretrained(str(source))
    return vae.float().eval().requires_grad_(False)


def _from_pretrained(source: str) -> AutoencoderKL:
    path = Path(source)
    if path.is_dir():
        folders = [folder for folder in (path, path / "vae") if (folder / "config.json").is_file()]
        if not folders:
            hint = (
                "; the run has not finished (its vae/ is written at the end)" if (path / "config.yaml").exists() else ""
            )
            raise UsageError(f"VAE {source}: expected config.json in the folder or in its vae/, found neither{hint}")
        source = str(folders[0])
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UsageError(f"VAE {source}: no such folder or file, and not a hub id (owner/name)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' affair, not the user's
            try:
                return AutoencoderKL.from_pretrained(source, use_safetensors=True)
            except OSError:
                if path.is_dir():
                    raise
                return AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True)  # a pipeline's
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"VAE {source}: cannot be loaded as an AutoencoderKL: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- identity ---------------------------------------------------------------------------------------------------------


def encoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns pixels into moments: encoder and quant_conv."""
    return _fingerprint(vae.state_dict(), ("encoder.", "quant_conv."))


def decoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns latents into pixels: decoder and post_quant_conv."""
    return _fingerprint(vae.state_dict(), ("decoder.", "post_quant_conv."))


def _fingerprint(tensors: Mapping[str, torch.Tensor], prefixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():  # diffusers' key order is the module's, hence stable
        if name.startswith(prefixes):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def downsampling_factor(vae: AutoencoderKL) -> int:
    """f: pixels per latent position along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def check_resolution(resolution: int, factor: int) -> None:
    """Raises UsageError unless `resolution` is a positive multiple of the downsampling factor f."""
    if resolution <= 0 or resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise UsageError(f"resolution: expected a positive multiple of f = {factor}, got {resolution}; {near} would do")


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """What one forward gives; pixels, target, moments and latents are fp32.

    pixels [B, C, H, W] as decoded, not clamped; target [B, C, H, W] what they are compared with; moments of q(z|x);
    latents z [B, c, h, w] as decoded; last_hidden [B, width, H, W] the detached input of the decoder's last
    convolution, from which the adaptive weight is computed.
    """

    pixels: torch.Tensor
    target: torch.Tensor
    moments: Moments
    latents: torch.Tensor
    last_hidden: torch.Tensor


class TrainableAutoencoder(nn.Module):
    """Owns the one forward of training. It goes through `accelerator.prepare`, so that DDP's hooks fire: calling
    `unwrap_model(vae).encode` instead trains one unsynchronised model per process."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.encoder_learns = encoder_learns(vae)
        self._last_hidden: torch.Tensor | None = None
        vae.decoder.conv_out.register_forward_pre_hook(self._keep_last_hidden)

    def _keep_last_hidden(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._last_hidden = inputs[0].detach()

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution: the adaptive weight compares gradients there."""
        layer: nn.Conv2d = self.vae.decoder.conv_out
        return layer

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) for images of this size."""
        factor = downsampling_factor(self.vae)
        return (int(self.vae.config.latent_channels), height // factor, width // factor)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> Reconstruction:
        """images [B, C, H, W] in [-1, 1], noise [B, c, h, w] standard normal, drawn by key => Reconstruction."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            moments = latents.encode(self.vae, images)
        z = moments.sample(noise.to(moments.mean))
        pixels = latents.at_least_fp32(self.vae.decode(z).sample)
        last_hidden, self._last_hidden = self._last_hidden, None
        assert last_hidden is not None
        return Reconstruction(pixels, images, moments, z, last_hidden)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)
