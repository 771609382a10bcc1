"""The latent contract: pixels -> moments (stored) -> latents (scaled, `normalisation.py`) and back.

Legend: B batch, C channels of an image or a sound, c latent channels, T frames, H W pixels, L samples, t h w latent
positions, n those of a sound.

- **pixels**  [B, C, H, W] in [-1, 1], of clips [B, C, T, H, W]; of sounds samples [B, C, L];
- **moments** mean and logvar, each [B, c, h, w], [B, c, t, h, w] or [B, c, n], raw and unscaled: what a latent store
  holds;
- **latents** z, sampled or the mean, then normalised: what a diffusion model sees.

What is encoded comes back as it was given: an image as an image, also from a class of clips, where it is one of one
frame; a clip as a clip, also from a class of images, frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldm_vae.autoencoder import signals
from ldm_vae.autoencoder.codebooks import beside
from ldm_vae.autoencoder.families import family_of, is_movq
from ldm_vae.autoencoder.lengths import check_frames, check_latent_frames, check_samples
from ldm_vae.core import rng

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to the same; stored logvar is clamped too


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision upcast to fp32; fp64 stays, so that exactness can be tested in it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Moments:
    """A diagonal Gaussian posterior q(z|x) = N(mean, exp(logvar)); mean and logvar [B, c, h, w].

    is_point: the network gives no variance (VQModel, AutoencoderTiny); logvar is then the smallest that there is, and a
    KL would mean nothing.

    >>> import torch
    >>> from ldm_vae import Moments
    >>> moments = Moments(mean=torch.zeros(1, 4, 8, 8), logvar=torch.zeros(1, 4, 8, 8))
    >>> z = moments.sample(torch.randn(1, 4, 8, 8))
    >>> moments.kl().sum().item()  # N(0, I) is the prior
    0.0
    """

    mean: torch.Tensor
    logvar: torch.Tensor
    is_point: bool = False

    def __repr__(self) -> str:
        what = "mean alone" if self.is_point else "mean and logvar"
        return f"Moments({what} {[*self.mean.shape]}, {self.mean.dtype}, {self.mean.device})"

    @classmethod
    def from_parameters(cls, parameters: torch.Tensor) -> Moments:
        """Make from an encoder's output [B, 2c, h, w] (mean, then logvar), in fp32, logvar clamped to LOGVAR_RANGE."""
        mean, logvar = at_least_fp32(parameters).chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @classmethod
    def of(cls, encoded: Any) -> Moments:
        """Make from what an autoencoder's `encode` gives, in fp32: its posterior's mean and variance, logvar clamped to
        LOGVAR_RANGE, or its latents where it gives no posterior.

        Raises:
            UsageError: it gives neither.
        """
        found = signals.held_by(encoded)
        if torch.is_tensor(found):
            return cls.point(found)
        if not hasattr(found, "mean"):  # AutoencoderKLCosmos: a distribution of one value
            return cls.point(found.mode())
        logvar = found.logvar if hasattr(found, "logvar") else 2.0 * at_least_fp32(found.std).log()
        return cls(at_least_fp32(found.mean), at_least_fp32(logvar).clamp(*LOGVAR_RANGE))

    @classmethod
    def point(cls, mean: torch.Tensor) -> Moments:
        """Make from the output of an encoder without a variance [B, c, h, w], in fp32: a VQModel's vectors before the
        codebook, say."""
        mean = at_least_fp32(mean)
        return cls(mean, torch.full_like(mean, LOGVAR_RANGE[0]), is_point=True)

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of a clip from those of its parts, in order."""
        mean, logvar = (torch.cat([getattr(one, name) for one in parts], dim=2) for name in ("mean", "logvar"))
        return replace(parts[0], mean=mean, logvar=logvar)

    def image(self) -> Moments:
        """The same without a time axis: of a clip of one frame [B, c, 1, h, w]."""
        if self.mean.ndim < 5:
            return self
        return replace(self, mean=self.mean[:, :, 0], logvar=self.logvar[:, :, 0])

    def clips(self, count: int) -> Moments:
        """The same of frames [B*T, c, h, w], count T of each clip, as clips [B, c, T, h, w]."""
        return replace(self, mean=signals.clips_of(self.mean, count), logvar=signals.clips_of(self.logvar, count))

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        return replace(self, mean=self.mean.to(device), logvar=self.logvar.to(device))

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """z = mean + exp(logvar / 2) * noise (Kingma & Welling 2014, eq. 10)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> torch.Tensor:
        """KL(q || N(0, I)) in nats, one value per latent element [B, c, h, w] (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


def encode(vae: Any, pixels: torch.Tensor) -> Moments:
    """pixels [B, C, H, W] => moments [B, c, h, w], [B, C, T, H, W] => [B, c, t, h, w], or samples [B, C, L] => [B, c,
    n], with a diffusers autoencoder.

    A VQModel's are its vectors before the codebook: `decode` quantises them, as latent diffusion on its latents does.
    So are those of a network with a quantizer beside it.

    Raises:
        UsageError: of clips or sounds, a length that the class would cut or pad, or cannot take; another signal than
            the class's.

    >>> import torch
    >>> from ldm_vae import encode, load_autoencoder
    >>> with torch.no_grad():
    ...     moments = encode(load_autoencoder("my-vae"), torch.zeros(2, 3, 32, 32))
    >>> moments.mean.shape, moments.logvar.shape
    (torch.Size([2, 4, 16, 16]), torch.Size([2, 4, 16, 16]))
    """
    family, frames = family_of(vae), pixels.shape[2] if pixels.ndim == 5 else None
    if family.signal == "video" and not pixels.is_meta:
        check_frames(vae, frames or 1)
    if family.signal == "audio" and pixels.ndim == 3 and not pixels.is_meta:
        check_samples(vae, pixels.shape[2])
    if family.single and len(pixels) > 1:
        parts = [encode(vae, one[None]) for one in pixels]
        mean, logvar = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "logvar"))
        return replace(parts[0], mean=mean, logvar=logvar)
    moments = Moments.of(signals.encoded(vae, pixels))
    if beside(vae) is not None:  # which takes the mean: nothing has trained a variance
        moments = Moments.point(moments.mean)
    if frames is None:
        return moments.image()
    return moments.clips(frames) if signals.is_by_frame(vae) else moments


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """unscaled z [B, c, h, w], [B, c, t, h, w] or [B, c, n] => pixels [B, C, H, W], [B, C, T, H, W] or samples [B, C,
    L], fp32 and not clamped.

    >>> import torch
    >>> from ldm_vae import decode, load_autoencoder
    >>> decode(load_autoencoder("my-vae"), torch.zeros(2, 4, 16, 16)).shape
    torch.Size([2, 3, 32, 32])
    """
    return pixels_of(vae, z)


def pixels_of(vae: Any, z: torch.Tensor, **options: Any) -> torch.Tensor:
    """`decode`, with options of that class's own."""
    family, frames = family_of(vae), z.shape[2] if z.ndim == 5 else None
    if family.signal == "video" and not z.is_meta:
        check_latent_frames(vae, frames or 1)
    if family.noise and (len(z) > 1 or "generator" not in options):  # one draw for each, so that no neighbour matters
        draws = [{"generator": torch.Generator(z.device).manual_seed(0), **options} for _ in z]
        return torch.cat([pixels_of(vae, one[None], **draw) for one, draw in zip(z, draws, strict=True)])
    if (family.single or signals.injects_noise(vae)) and len(z) > 1:
        return torch.cat([pixels_of(vae, one[None], **options) for one in z])
    z = z.to(vae.dtype)
    if (books := beside(vae)) is not None and not options.pop("force_not_quantize", False):
        z = books(z)
    if is_movq(vae):
        options.setdefault("force_not_quantize", True)
    if family.law == "inside":
        z = z.contiguous()  # AutoencoderRAE takes views of it
    z, keywords = signals.enter_latents(vae, z)
    with signals.same_draws(vae, z.device):
        decoded = vae.decode(z, **keywords | options)
    return at_least_fp32(signals.leave(vae, decoded, frames))


@torch.no_grad()
def nearest_codes(vae: Any, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors before the codebook [B, c, *p] => indices int64: of a VQModel [B, *p], by its own quantizer in fp32; of
    the quantizer beside a network [B, q, *p]."""
    if (books := beside(vae)) is not None:
        return books.indices(at_least_fp32(vectors))
    # distances between close codes vanish in half precision
    with torch.autocast(vectors.device.type, enabled=False):
        _, _, (_, _, indices) = vae.quantize(signals.frames_of(at_least_fp32(vectors)))
    return indices.view(vectors.shape[0], *vectors.shape[2:])  # type: ignore[no-any-return]


def decode_indices(vae: Any, indices: torch.Tensor) -> torch.Tensor:
    """indices [B, *p] of a VQModel's codes => pixels [B, C, H, W], of clips [B, C, T, H, W], fp32 and not clamped;
    indices [B, k, *p] of a quantizer beside a network, of its first k codebooks: fewer of them are a code of less
    rate."""
    books = beside(vae)
    vectors = vae.quantize.embedding(indices).movedim(-1, 1) if books is None else books.vectors(indices)
    return pixels_of(vae, vectors, force_not_quantize=True)


def posterior_noise(seed: int, positions: Iterable[int], shape: Iterable[int]) -> torch.Tensor:
    """Noise of the posterior, fp32 [B, c, h, w], keyed by each image's position in the global stream of images."""
    return rng.normal(seed, "posterior", positions, tuple(shape))
