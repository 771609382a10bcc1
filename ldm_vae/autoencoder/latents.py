"""The latent contract: pixels -> moments (stored) -> latents (scaled) and back, in this one place.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.

- **pixels**  [B, C, H, W] in [-1, 1];
- **moments** mean and logvar, each [B, c, h, w], raw and unscaled: what a latent store holds;
- **latents** z, sampled or the mean, then normalised: what a diffusion model sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError, WorkError

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to the same; stored logvar is clamped too
LEAST_VARIANCE = 2 * math.exp(LOGVAR_RANGE[0])  # of a posterior at the end of that range, and rounding: nothing

NormalisationKind = Literal["scale", "shift", "channel"]


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

    @classmethod
    def from_parameters(cls, parameters: torch.Tensor) -> Moments:
        """Make from an encoder's output [B, 2c, h, w] (mean, then logvar), in fp32, logvar clamped to LOGVAR_RANGE."""
        mean, logvar = at_least_fp32(parameters).chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @classmethod
    def point(cls, mean: torch.Tensor) -> Moments:
        """Make from the output of an encoder without a variance [B, c, h, w], in fp32: a VQModel's vectors before the
        codebook, say."""
        mean = at_least_fp32(mean)
        return cls(mean, torch.full_like(mean, LOGVAR_RANGE[0]), is_point=True)

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
    """pixels [B, C, H, W] => moments [B, c, h, w], with a diffusers autoencoder.

    A VQModel's are its vectors before the codebook: `decode` quantises them, as latent diffusion on its latents does.

    >>> import torch
    >>> from ldm_vae import encode, load_autoencoder
    >>> with torch.no_grad():
    ...     moments = encode(load_autoencoder("my-vae"), torch.zeros(2, 3, 32, 32))
    >>> moments.mean.shape, moments.logvar.shape
    (torch.Size([2, 4, 16, 16]), torch.Size([2, 4, 16, 16]))
    """
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return Moments.from_parameters(encoded.latent_dist.parameters)
    return Moments.point(encoded.latents)


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """unscaled z [B, c, h, w] => pixels [B, C, H, W], fp32 and not clamped.

    >>> import torch
    >>> from ldm_vae import decode, load_autoencoder
    >>> decode(load_autoencoder("my-vae"), torch.zeros(2, 4, 16, 16)).shape
    torch.Size([2, 3, 32, 32])
    """
    pixels: torch.Tensor = vae.decode(z.to(vae.dtype)).sample
    return at_least_fp32(pixels)


@torch.no_grad()
def nearest_codes(vae: Any, vectors: torch.Tensor) -> torch.Tensor:
    """A VQModel's vectors before the codebook [B, c, h, w] => indices int64 [B, h, w]: its own quantizer, in fp32."""
    # distances between close codes vanish in half precision
    with torch.autocast(vectors.device.type, enabled=False):
        _, _, (_, _, indices) = vae.quantize(at_least_fp32(vectors))
    return indices.view(vectors.shape[0], *vectors.shape[2:])  # type: ignore[no-any-return]


def decode_indices(vae: Any, indices: torch.Tensor) -> torch.Tensor:
    """indices [B, h, w] of a VQModel's codes => pixels [B, C, H, W], fp32 and not clamped."""
    vectors = vae.quantize.embedding(indices).permute(0, 3, 1, 2)
    pixels: torch.Tensor = vae.decode(vectors.to(vae.dtype), force_not_quantize=True).sample
    return at_least_fp32(pixels)


def posterior_noise(seed: int, positions: Iterable[int], shape: Iterable[int]) -> torch.Tensor:
    """Noise of the posterior, fp32 [B, c, h, w], keyed by each image's position in the global stream of images."""
    return rng.normal(seed, "posterior", positions, tuple(shape))


@dataclass(frozen=True)
class Normalisation:
    """The one way from z to latents that a VAE's config.json names, and back.

    - scale:   z * scaling_factor (Stable Diffusion, SDXL);
    - shift:   (z - shift_factor) * scaling_factor (SD3, FLUX);
    - channel: (z - latents_mean) * scaling_factor / latents_std, the inverse of SDXL's
      z * latents_std / scaling_factor + latents_mean.

    >>> import torch
    >>> from ldm_vae import Normalisation
    >>> sd = Normalisation(scaling_factor=0.18215)
    >>> sd.kind, sd.undo(sd.apply(torch.ones(1, 4, 8, 8))).mean().item()
    ('scale', 1.0)
    """

    scaling_factor: float
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.shift_factor is not None and self.latents_mean is not None:
            raise ValueError("shift_factor and latents_mean are both set: latents would be shifted twice")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std are set together or not at all")
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            value, divides = getattr(self, name), name in ("scaling_factor", "latents_std")
            for number in value if isinstance(value, tuple) else [] if value is None else [value]:
                if not math.isfinite(number) or (divides and number <= 0):
                    raise ValueError(f"{name}: expected a finite number{' above 0' if divides else ''}, got {number:g}")

    @property
    def kind(self) -> NormalisationKind:
        if self.latents_mean is not None:
            return "channel"
        return "scale" if self.shift_factor is None else "shift"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Normalisation:
        """Make from a diffusers config (or a manifest): the keys that are absent or null count as not set.

        Raises:
            UsageError: it names two normalisations, or one by which nobody can divide; `where` is what has this config.
        """
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        try:
            return cls(
                scaling_factor=1.0 if scale is None else float(scale),
                shift_factor=None if shift is None else float(shift),
                latents_mean=None if mean is None else tuple(map(float, mean)),
                latents_std=None if std is None else tuple(map(float, std)),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise UsageError(f"{where}: {error}; `ldm-vae export SRC OUT --stats DATA` measures it") from error

    @classmethod
    def from_statistics(cls, kind: NormalisationKind, mean: torch.Tensor, variance: torch.Tensor) -> Normalisation:
        """Make from measured per-channel mean [c] and variance [c] (fp64) of the sampled latents.

        The scalar variance is that of all elements together: E[variance_c] + Var[mean_c].

        Raises:
            WorkError: the latents, or of kind `channel` a channel of them, do not vary.
        """
        scalar_mean = float(mean.mean())
        # law of total variance over all elements
        scalar_variance = float(variance.mean() + mean.var(unbiased=False))
        varies = scalar_variance > LEAST_VARIANCE
        if not (varies and (kind != "channel" or bool((variance > LEAST_VARIANCE).all()))):
            what = "a channel of the latents does" if varies else "the latents do"
            raise WorkError(f"normalisation {kind}: {what} not vary, and nothing scales that to a variance of 1")
        if kind == "channel":
            return cls(1.0, None, tuple(mean.tolist()), tuple(variance.sqrt().tolist()))
        return cls(1.0 / math.sqrt(scalar_variance), scalar_mean if kind == "shift" else None)

    def to_config(self) -> dict[str, Any]:
        """All four keys, the unused ones null, so that writing one normalisation erases any other."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": None if self.latents_mean is None else list(self.latents_mean),
            "latents_std": None if self.latents_std is None else list(self.latents_std),
        }

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """z => latents, both [..., c, h, w]."""
        shift, scale = self._affine(z)
        return (z - shift) * scale

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """latents => z, both [..., c, h, w]."""
        shift, scale = self._affine(latents)
        return latents / scale + shift

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        if self.latents_mean is None or self.latents_std is None:
            return self.shift_factor or 0.0, self.scaling_factor
        shift = torch.tensor(self.latents_mean, device=like.device, dtype=like.dtype).view(-1, 1, 1)
        std = torch.tensor(self.latents_std, device=like.device, dtype=like.dtype).view(-1, 1, 1)
        return shift, self.scaling_factor / std
