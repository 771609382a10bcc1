"""The autoencoder: build one from a config, load one from anywhere, and the trainable wrapper with its one forward.

The trained module *is* a model of diffusers (AutoencoderKL, VQModel, AutoencoderTiny): no parallel network code, no
conversion at export. What lies between encoder and decoder while training is a bottleneck (ldm_vae/models).

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from pydantic import model_validator
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, GaussianBottleneck
from ldm_vae.autoencoder.fine_tuning import ENCODER, encoder_learns
from ldm_vae.autoencoder.finite import check_weights
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.weights.files import say
from ldm_vae.autoencoder.weights.networks import (
    CLASSES,
    CONFIG,
    find_folder,
    load_folder,
)
from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError
from ldm_vae.data.preprocessing import read_beside, read_hub, record


class AutoencoderConfig(Part):
    """Shape of a KL autoencoder, in diffusers' names; f = 2 ** (number of widths - 1).

    >>> from ldm_vae import AutoencoderConfig
    >>> shape = AutoencoderConfig(block_out_channels=(16, 32, 32), latent_channels=8, norm_num_groups=8)  # f4
    >>> shape.build().config.latent_channels
    8
    """

    kind: Literal["kl"] = "kl"
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

    def shape(self) -> dict[str, Any]:
        """The knobs that stand in the model's config.json, by diffusers' names."""
        return self.model_dump(exclude={"kind"})

    def build(self) -> AutoencoderKL:
        """A randomly initialised network; its scaling_factor is 1 until it is measured."""
        blocks = len(self.block_out_channels)
        return AutoencoderKL(
            **self.shape() | {"out_channels": self.in_channels},
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            scaling_factor=1.0,
        )

    def bottleneck(self, vae: AutoencoderKL) -> Bottleneck:
        return GaussianBottleneck(vae)


# --- loading ----------------------------------------------------------------------------------------------------------


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
            say(f"{place}: its own config.json is taken; {config} is for single files")
        folder = find_folder(str(source), place)
        vae = load_folder(folder, place, CLASSES)
        local, subfolder = path.is_dir(), "vae" if folder.name == "vae" else None
        record(vae, read_beside(folder / CONFIG) if local else read_hub(str(source), subfolder))
    check_weights(vae, place)
    return vae.float().eval().requires_grad_(False)


# --- identity ---------------------------------------------------------------------------------------------------------


def encoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns pixels into moments (or indices): encoder, quant_conv and, in a VQModel, the codebook."""
    return _fingerprint(vae.state_dict(), ENCODER)


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


def downsampling_factor(vae: Any) -> int:
    """f: pixels per latent position along one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def sample_size(vae: Any) -> int:
    """Side in pixels of the images that it was trained on; 512 where its config does not say (AutoencoderTiny)."""
    return int(vae.config.get("sample_size", 512))


def only_kl(vae: Any, what: str) -> None:
    """Raises UsageError unless the VAE is an AutoencoderKL; `what` is the argument that asked for more."""
    if not isinstance(vae, AutoencoderKL):
        raise UsageError(f"{what}: expected an AutoencoderKL, got a {type(vae).__name__}")


def check_resolution(resolution: int, factor: int) -> None:
    """Raises UsageError unless `resolution` is a positive multiple of the downsampling factor f."""
    if resolution <= 0 or resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise UsageError(f"resolution: expected a positive multiple of f = {factor}, got {resolution}; {near} would do")


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """What one forward gives; all fp32 (fp64 in tests of exactness).

    images [B, C, H, W] as encoded; pixels as decoded, not clamped, and target what they are compared with, of one shape
    (that of the images unless a perturbation moved both); moments of q(z|x); latents z [B, c, h, w] before any
    perturbation; last_hidden the detached input of the decoder's last convolution, from which the adaptive weight is
    computed; codes where there is a codebook; images_seen when it was made.
    """

    images: torch.Tensor
    pixels: torch.Tensor
    target: torch.Tensor
    moments: Moments
    latents: torch.Tensor
    last_hidden: torch.Tensor
    codes: Codes | None = None
    images_seen: int = 0


@dataclass(frozen=True)
class Draw:
    """What a perturbation may draw from: noise [B, n, h, w] standard normal, keyed per image, so it depends neither on
    the rank nor on a resume; images [B, C, H, W] as encoded; images_seen keys what is drawn for the whole batch."""

    noise: torch.Tensor
    images: torch.Tensor
    images_seen: int

    def uniform(self, channel: int) -> torch.Tensor:
        """One number in (0, 1) per image [B], from the first position of a channel of the noise."""
        chances: torch.Tensor = torch.special.ndtr(self.noise[:, channel, 0, 0])
        return chances


class TrainableAutoencoder(nn.Module):
    """Owns the one forward of training. It goes through `accelerator.prepare`, so that DDP's hooks fire: calling
    `unwrap_model(vae).encode` instead trains one unsynchronised model per process."""

    def __init__(self, vae: Any, bottleneck: Bottleneck | None = None, perturbations: Sequence[nn.Module] = ()) -> None:
        """bottleneck: what the model's config gives; a Gaussian's by default."""
        super().__init__()
        self.vae = vae
        self.encoder_learns = encoder_learns(vae)
        self.bottleneck = GaussianBottleneck(vae) if bottleneck is None else bottleneck
        self.perturbations = nn.ModuleList(sorted(perturbations, key=lambda part: getattr(part, "resizes", False)))
        self._last_hidden: torch.Tensor | None = None
        self.last_layer.register_forward_pre_hook(self._keep_last_hidden)

    def _keep_last_hidden(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._last_hidden = inputs[0].detach()

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution: the adaptive weight compares gradients there."""
        return self.bottleneck.last_layer(self.vae)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) for images of this size."""
        factor = downsampling_factor(self.vae)
        return (self._latent_channels, height // factor, width // factor)

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(n, h, w) of the noise that `forward` takes for each image of this size."""
        _, rows, columns = self.latent_shape(height, width)
        return (self.bottleneck.noise_channels + sum(self._wanted()), rows, columns)

    def _wanted(self) -> list[int]:
        """Channels of noise of each perturbation."""
        return [int(part.noise_channels(self._latent_channels)) for part in self.perturbations]  # type: ignore[operator]

    @property
    def _latent_channels(self) -> int:
        # a VQModel's quant_conv may end in another number than its encoder
        return int(self.vae.config.get("vq_embed_dim") or self.vae.config.latent_channels)

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, images_seen: int = 0, stored: Moments | None = None
    ) -> Reconstruction:
        """images [B, C, H, W] in [-1, 1], noise [B, n, h, w] standard normal, drawn by key => Reconstruction.

        stored: moments of these images; the encoder is then not run.
        """
        own = noise[:, : self.bottleneck.noise_channels]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            if stored is None:
                encoded = self.bottleneck.encode(self.vae, images, own, images_seen)
            else:
                encoded = self.bottleneck.draw(stored, own)
        z, target, used = encoded.latents, images, self.bottleneck.noise_channels
        for perturbation, wanted in zip(self.perturbations, self._wanted(), strict=True):
            z, target = perturbation(z, target, Draw(noise[:, used : used + wanted].to(z), images, images_seen))
            used += wanted
        pixels = latents.at_least_fp32(self.bottleneck.decode(self.vae, z))
        last_hidden, self._last_hidden = self._last_hidden, None
        assert last_hidden is not None
        return Reconstruction(
            images, pixels, target, encoded.moments, encoded.latents, last_hidden, encoded.codes, images_seen
        )


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)
