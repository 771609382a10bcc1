"""Samples of a diffusion run: grids of decoded samples, and their distances from what they should look like, beside two
sets that need no diffusion model.

    RUN/samples/images-000012345.png   a grid, its label above each sample; a column for each class
    RUN/samples/originals.png          as many latents of the store, decoded: the same labels at the same places
    RUN/report/diffusion.json          which grids there are, how they were sampled, and the distances:
        samples   of the diffusion model, decoded
        field     decoded Gaussian fields with the mean, deviation and spectrum of the latents
        noise     decoded N(0, I), of the latents' own scale: what the sampler starts from

The distance is Frechet's in EfficientNet-Lite0's features and, where a CLIP is supplied, CMMD beside it. Both are
biased by the number of images, so all sets have the same.

Legend: B batch, C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.data.alpha import three_channels
from ldm_vae.diffusion.generator import Generator
from ldm_vae.metrics import result
from ldm_vae.metrics.cmmd import cmmd
from ldm_vae.metrics.frechet import Gaussian, frechet_distance
from ldm_vae.metrics.profile import radial_spectrum
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.samples import field
from ldm_vae.perceptual import features

NAME, RECORD = "fd_efflite0", "diffusion.json"
NOT_INSTALLED = f"{NAME} is not measured: pip install 'ldm-vae[features]'"


class Judge:
    """Features of images, of a network whose trunk is a module."""

    def __init__(self, network: features.Features, alpha: bool = False) -> None:
        """alpha: the images have it, and are seen on white."""
        self.network, self.alpha = network, alpha

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [B, C, H, W] in [-1, 1] and beyond, 8-bit as the protocol has it => [B, D] on the CPU."""
        device = next(self.network.trunk.parameters()).device  # type: ignore[attr-defined]
        seen = PINNED.pair(pixels, pixels, alpha=self.alpha).on_white.original
        return self.network.trunk(three_channels(seen).to(device)).cpu()


class Looks(Judge):
    """Sets of images as Gaussians of features, and the Frechet distance between two of them."""

    name = NAME

    def of(self, images: Iterable[torch.Tensor]) -> Gaussian:
        """images: as `features` takes them."""
        return self.summed(map(self.features, images))

    def summed(self, rows: Iterable[torch.Tensor]) -> Gaussian:
        """rows: of `features`, batch by batch."""
        gaussian = Gaussian()
        for some in rows:
            gaussian.update(some)
        return gaussian

    def distance(self, one: Gaussian, other: Gaussian) -> float:
        """Frechet distance; both of at least two images."""
        size = self.network.dimensions
        return frechet_distance(*one.compute(size)[1:], *other.compute(size)[1:])


class ClipLooks(Judge):
    """Sets of images as a CLIP's embeddings [N, D], and CMMD between two of them."""

    name = "cmmd"

    def summed(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(rows))

    def distance(self, one: torch.Tensor, other: torch.Tensor) -> float:
        return cmmd(one, other)


def looks(device: torch.device, alpha: bool = False) -> Looks | None:
    """Load the features of the Frechet distance; None where their weights are not installed."""
    network = features.efflite0(device)
    return None if network is None else Looks(network, alpha)


def clip_looks(source: str | None) -> ClipLooks | None:
    """Load the CLIP on the CPU, for `record_distances` to move; None where none is supplied. Raises what
    `features.clip` does."""
    return None if source is None else ClipLooks(features.clip(source, torch.device("cpu")))


# --- of a run ---------------------------------------------------------------------------------------------------------


def record_distances(
    run: Path,
    generator: Generator,
    stored: Iterable[torch.Tensor],
    count: int,
    batch_size: int,
    clip: ClipLooks | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure samples, fields and noise against the decoded `stored` latents [c, h, w], `count` images each; by name in
    the record, `distances` (Frechet) where the features are installed and `cmmd` where a CLIP is supplied."""
    judges: dict[str, Any] = {"distances": looks(generator.device, has_alpha(generator.vae)), "cmmd": clip}
    judges = {name: judge for name, judge in judges.items() if judge is not None}
    _record(run, {"distances": None, "cmmd": None})  # those of an earlier call do not stay
    if not judges:
        return {}
    if clip is not None:
        clip.alpha = has_alpha(generator.vae)
        clip.network.trunk.to(generator.device)  # type: ignore[attr-defined]
    latents = torch.stack(list(stored))
    noise = generator.noise(range(count))

    def decoded(scaled: torch.Tensor) -> Iterator[torch.Tensor]:
        return map(generator.decode, torch.split(scaled, batch_size))

    def seen(images: Iterable[torch.Tensor]) -> dict[str, Any]:  # drawn and decoded once for all judges
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in judges}
        for pixels in images:
            for name, judge in judges.items():
                rows[name].append(judge.features(pixels))
        return {name: judge.summed(rows[name]) for name, judge in judges.items()}

    reference = seen(decoded(latents))
    sets = {
        "samples": seen(generator.batches(count, batch_size)),
        "field": seen(decoded(field(noise, field_statistics(latents)))),
        "noise": seen(decoded(noise)),
    }
    measured = {}
    for name, judge in judges.items():
        distances = {what: judge.distance(reference[name], of[name]) for what, of in sets.items()}
        measured[name] = {"metric": judge.name, "n": count} | distances
    _record(run, measured)
    return measured


def in_words(measured: dict[str, dict[str, Any]]) -> str:
    """Lines that the program prints of `record_distances`, a line for each distance."""
    lines = [] if "distances" in measured else [NOT_INSTALLED]
    for found in measured.values():
        decimals = 1 if found["metric"] == NAME else 3
        samples, fields, noise = (f"{found[name]:.{decimals}f}" for name in ("samples", "field", "noise"))
        lines.append(
            f"{found['metric']} to decoded latents of the store, {found['n']:,} images each: samples {samples}, "
            f"Gaussian fields {fields}, noise {noise}"
        )
    return "\n".join(lines)


def _record(run: Path, found: dict[str, Any]) -> None:
    result.update(run / "report" / RECORD, found)


def field_statistics(latents: torch.Tensor) -> dict[str, Any]:
    """latents [N, c, h, w] => what `metrics.samples.field` takes."""
    return {
        "mean": latents.double().mean(dim=(0, 2, 3)).tolist(),
        "std": latents.double().std(dim=(0, 2, 3)).tolist(),
        "spectrum": {"latents": (radial_spectrum(latents) / len(latents)).tolist()},
    }
