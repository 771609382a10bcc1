"""The pictures of a latent space, lossless: walks between images, along channels, and samples of two priors; of clips
the middle frames.

    latent_space/interpolation-0.linear.png     one row: the first image as decoded ... the second
    latent_space/interpolation-0.spherical.png  the same two, along the arc
    latent_space/traversal-03.png               channel 3 of one image, from -3 deviations to 3
    latent_space/samples.normal.png             z from N(0, I);  samples.field.png, samples.mixture.png: fitted ones

Legend: N pictures, C image channels, R side, c latent channels, h w latent positions (of clips t h w).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.core import atomic_io, rng
from ldm_vae.core.ownership import mark
from ldm_vae.core.pictures import save, sheet
from ldm_vae.data.alpha import visible
from ldm_vae.data.transforms import to_uint8
from ldm_vae.latent_space import walks
from ldm_vae.latent_space.channels import ChannelStatistics
from ldm_vae.latent_space.mixture import PER_COMPONENT, fit_mixture
from ldm_vae.metrics.batches import spread
from ldm_vae.metrics.samples import field

FOLDER = "latent_space"
COLUMNS = 8  # of samples
SAMPLES = 16  # of each prior
TRAVERSED = 16  # channels at most: those of the largest deviation

Json = dict[str, Any]


class LatentPictures:
    """Collects pictures in an empty folder; `entries` is what latent_space.json says of them."""

    def __init__(self, folder: Path, vae: Any, device: torch.device, alpha: bool = False) -> None:
        self.folder = folder
        mark(folder)
        self.vae, self.device, self.alpha = vae, device, alpha
        self.entries: list[Json] = []

    def interpolation(self, start: torch.Tensor, end: torch.Tensor, keys: tuple[str, str]) -> None:
        """Both ways from one image's latent [c, h, w] to another's."""
        pair = sum(entry["kind"] == "interpolation" for entry in self.entries) // 2
        for way, path in (("linear", walks.linear), ("spherical", walks.spherical)):
            self._keep(
                f"interpolation-{pair}.{way}.png",
                path(start, end),
                walks.FRAMES,
                kind="interpolation",
                way=way,
                keys=keys,
            )

    def traversal(self, z: torch.Tensor, channel: int, mean: float, std: float, key: str) -> None:
        """One channel of the latent [c, h, w] of the image `key`."""
        frames = walks.traversal(z, channel, mean, std)
        self._keep(
            f"traversal-{channel:02d}.png",
            frames,
            walks.FRAMES,
            kind="traversal",
            channel=channel,
            keys=(key,),
        )

    def samples(self, prior: str, z: torch.Tensor) -> None:
        """Latents [N, c, h, w] drawn from a prior of this name."""
        self._keep(f"samples.{prior}.png", z, COLUMNS, kind="samples", prior=prior)

    def _keep(self, name: str, z: torch.Tensor, columns: int, **entry: Any) -> None:
        decoded = torch.cat([to_uint8(self._decode(one)) for one in torch.split(z, COLUMNS)])
        decoded = visible(decoded, self.alpha)
        gap = max(1, decoded.shape[-1] // 32)
        # without the border: the page divides its width by the columns
        save(sheet(decoded, columns, gap=gap, value=128)[:, gap:-gap, gap:-gap], self.folder / name)
        self.entries.append({"file": f"{FOLDER}/{name}", "frames": len(decoded), **entry})

    @torch.no_grad()
    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        decoded = finite.decode(self.vae, z.to(self.device).float()).cpu()
        return decoded if decoded.ndim == 4 else decoded[:, :, decoded.shape[2] // 2]


def keep_pictures(
    output: Path,
    vae: Any,
    moments: Moments,
    channels: ChannelStatistics,
    spectrum: Sequence[float],
    keys: Sequence[str],
    noise: torch.Tensor,
    *,
    pairs: int,
    components: int,
    seed: int,
    alpha: bool = False,
) -> tuple[list[Json], Json | None]:
    """Write output/latent_space in the place of an earlier one, from the posteriors [M, c, h, w] of the images `keys`.

    It holds walks between their means, and samples of N(0, I), of a Gaussian field with the latents' radial `spectrum`,
    and of a mixture of `components` fitted to latents drawn with `noise`. Returns the list of pictures, and the
    mixture's figures. alpha: pictures are over a checkerboard."""
    means = moments.mean
    with atomic_io.whole_folder(output / FOLDER, atomic_io.anything) as folder:
        pictures = LatentPictures(folder, vae, next(vae.parameters()).device, alpha)

        # walks: between images far apart in the data, since folders keep a class together
        places = spread(len(means), 2 * pairs)
        half = len(places) // 2
        for first, second in zip(places[:half], places[half : 2 * half], strict=True):
            pictures.interpolation(means[first], means[second], (keys[first], keys[second]))
        for channel in sorted(channels.std.argsort(descending=True, stable=True)[:TRAVERSED].tolist()):
            mean, std = float(channels.mean[channel]), float(channels.std[channel])
            pictures.traversal(means[0], channel, mean, std, keys[0])

        # samples: a codebook or a distilled encoder was never meant for N(0, I)
        white = rng.normal(seed, "samples", range(SAMPLES), means.shape[1:])
        if not moments.is_point:
            pictures.samples("normal", white)
        if means[0, 0].numel() > 1:
            measured = {"mean": channels.mean.tolist(), "std": channels.std.tolist()}
            pictures.samples("field", field(white, measured | {"spectrum": {"latents": spectrum}}))
        fitted = None
        if components and len(means) >= PER_COMPONENT:
            mixture = fit_mixture(moments.sample(noise), components, seed)
            pictures.samples("mixture", mixture.sample(SAMPLES, seed))
            fitted = mixture.figures()
    return pictures.entries, fitted
