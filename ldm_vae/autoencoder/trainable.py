"""The trainable wrapper: the one forward of training.

The trained module *is* a model of diffusers (AutoencoderKL, VQModel, AutoencoderTiny): no parallel network code, no
conversion at export. What lies between encoder and decoder while training is a bottleneck (ldm_vae/models).

Legend: B batch, C image channels, c latent channels, T frames, H W pixels, t h w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm_vae.autoencoder.bottleneck import Bottleneck, Codes, GaussianBottleneck
from ldm_vae.autoencoder.fine_tuning import encoder_learns, is_encoders
from ldm_vae.autoencoder.geometry import latent_channels, latent_size
from ldm_vae.autoencoder.last_layer import Call, Watch
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.signals import clips_of, frames_of, spread_frames
from ldm_vae.data.alpha import composite


@dataclass(frozen=True)
class Reconstruction:
    """Result of one forward; all fp32 (fp64 in tests of exactness).

    images [B, C, H, W] as encoded, or samples [B, C, L] of sounds; pixels as decoded, not clamped, and target what they
    are compared with, of one shape (that of the images unless a perturbation moved both); of clips [B, C, T, H, W] both
    are their frames [B*T, C, H, W], so that every term and discriminator of images sees those; moments of q(z|x);
    latents z [B, c, h, w] or [B, c, t, h, w] before any perturbation; last_calls of the decoder's last layer, from
    which the adaptive weight is computed; codes where there is a codebook; images_seen when it was made; background
    [B*T, 3, 1, 1] of images with alpha, one for a clip, and draws [B] in (0, 1) of clips, by which terms choose frames:
    both drawn by key.
    """

    images: torch.Tensor
    pixels: torch.Tensor
    target: torch.Tensor
    moments: Moments
    latents: torch.Tensor
    last_calls: tuple[Call, ...]
    codes: Codes | None = None
    images_seen: int = 0
    background: torch.Tensor | None = None
    draws: torch.Tensor | None = None

    @property
    def frames(self) -> int:
        """T of clips, 1 of images."""
        return self.images.shape[2] if self.images.ndim == 5 else 1

    def seen(self, pixels: torch.Tensor, domain: str = "pixels") -> torch.Tensor:
        """The images that losses and the adversary judge, of pixels [B*T, C, H, W]: of those with alpha, the colour
        over the background; for the domain "clips" as clips [B, C, T, H, W], an image as one of one frame."""
        shown = pixels if self.background is None else composite(pixels, self.background)
        return clips_of(shown, self.frames) if domain == "clips" else shown

    def some(self, images: torch.Tensor, wanted: int | None) -> torch.Tensor:
        """So many frames of each clip, chosen by key, of all [B*T, C, H, W]; all of them if None."""
        if wanted is None or wanted >= self.frames:
            return images
        assert self.draws is not None
        return images[spread_frames(self.draws, self.frames, wanted)]


@dataclass(frozen=True)
class Draw:
    """Source of a perturbation's randomness, keyed per image: neither the rank nor a resume changes a draw.

    noise [B, n, h, w], of clips [B, n, t, h, w], standard normal; images as encoded; images_seen keys what is drawn for
    the batch; alpha: the fourth channel of the images is straight alpha.
    """

    noise: torch.Tensor
    images: torch.Tensor
    images_seen: int
    alpha: bool = False

    def uniform(self, channel: int) -> torch.Tensor:
        """One number in (0, 1) per image [B], from the first position of a channel of the noise."""
        chances: torch.Tensor = torch.special.ndtr(self.noise[:, channel].flatten(1)[:, 0])
        return chances


class TrainableAutoencoder(nn.Module):
    """Owns the one forward of training. It goes through `accelerator.prepare`, so that DDP's hooks fire: calling
    `unwrap_model(vae).encode` instead trains one unsynchronised model per process."""

    def __init__(
        self,
        vae: Any,
        bottleneck: Bottleneck | None = None,
        perturbations: Sequence[nn.Module] = (),
        alpha: bool = False,
    ) -> None:
        """bottleneck: what the model's config gives; a Gaussian's by default. alpha: the fourth channel of its images
        is straight alpha, so that each is given a background."""
        super().__init__()
        self.alpha = alpha
        self.vae = vae
        self.encoder_learns = encoder_learns(vae)
        self.bottleneck = GaussianBottleneck(vae) if bottleneck is None else bottleneck
        self.perturbations = nn.ModuleList(sorted(perturbations, key=lambda part: getattr(part, "resizes", False)))
        self._watch = Watch(vae)
        self._hold_still()

    def train(self, mode: bool = True) -> TrainableAutoencoder:
        super().train(mode)
        self._hold_still()
        return self

    def _hold_still(self) -> None:
        """A frozen encoder gives what it gives a store: nothing of its own is drawn (dropout, AutoencoderRAE's
        noise_tau), which no key would decide."""
        if not self.encoder_learns:
            self.vae.training = False  # of the network itself; its decoder trains
            for name, part in self.vae.named_children():
                if is_encoders(f"{name}."):
                    part.eval()

    @property
    def last_layer(self) -> nn.Module:
        """The decoder's last layer with weights: the adaptive weight compares gradients there."""
        return self._watch.layer

    def latent_shape(self, *size: int) -> tuple[int, ...]:
        """(c, h, w) for images of a size (H, W), (c, t, h, w) for clips of a size (T, H, W), (c, n) for sounds of a
        size (L,)."""
        return latent_size(self.vae, *size)

    def noise_shape(self, *size: int) -> tuple[int, ...]:
        """(n, h, w) or (n, t, h, w) of the noise that `forward` takes for each image or clip of a size."""
        _, *positions = self.latent_shape(*size)
        choice = len(size) == 3  # of the frames that a term sees; the last, so that no other draw moves
        return (self.bottleneck.noise_channels + sum(self._wanted()) + 3 * self.alpha + choice, *positions)

    def _wanted(self) -> list[int]:
        """Channels of noise of each perturbation."""
        return [int(part.noise_channels(latent_channels(self.vae))) for part in self.perturbations]  # type: ignore[operator]

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, images_seen: int = 0, stored: Moments | None = None
    ) -> Reconstruction:
        """images [B, C, H, W], or clips [B, C, T, H, W], in [-1, 1], or sounds [B, C, L], noise of the latents'
        positions [B, n, h, w], [B, n, t, h, w] or [B, n, positions], standard normal, drawn by key => Reconstruction.

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
            z, target = perturbation(
                z, target, Draw(noise[:, used : used + wanted].to(z), images, images_seen, self.alpha)
            )
            used += wanted
        self._watch.take()  # of decodes elsewhere, and of the adaptive weight's calls
        pixels, target = frames_of(self.bottleneck.decode(self.vae, z)), frames_of(target)
        draw, clips = Draw(noise[:, used:].to(pixels), images, 0), images.ndim == 5
        return Reconstruction(
            images, pixels, target, encoded.moments, encoded.latents, self._watch.take(), encoded.codes, images_seen,
            self._background(draw, len(pixels) // len(images)), draw.uniform(-1) if clips else None,
        )  # fmt: skip

    def _background(self, draw: Draw, frames: int) -> torch.Tensor | None:
        """A colour in [-1, 1] per image or clip, any as likely, for each of its frames [B*T, 3, 1, 1]; behind the noise
        of all that changes latents, so that no other draw moves."""
        if not self.alpha:
            return None
        colours = torch.stack([draw.uniform(channel) for channel in range(3)], dim=1)
        return (2 * colours[:, :, None, None] - 1).repeat_interleave(frames, dim=0)


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in parameters)
