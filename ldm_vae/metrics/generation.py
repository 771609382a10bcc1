"""What a diffusion run leaves to look at: grids of decoded samples, and how far such samples are from what they should
look like, beside two sets that anybody can make without a diffusion model.

    RUN/samples/images-000012345.png   a grid, a column for each class
    RUN/report/diffusion.json          which grids there are, how they were sampled, and the distances:
        samples   of the diffusion model, decoded
        field     decoded Gaussian fields with the mean, deviation and spectrum of the latents
        noise     decoded N(0, I), of the latents' own scale: what the sampler starts from

The distance is Frechet's in EfficientNet-Lite0's features. It is biased by the number of images, so all sets have the
same.

Legend: B batch, C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import make_grid

from ldm_vae.generator import Generator
from ldm_vae.metrics import features, result
from ldm_vae.metrics.frechet import Gaussian, frechet_distance
from ldm_vae.metrics.pictures import save
from ldm_vae.metrics.profile import radial_spectrum
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.samples import field

NAME, RECORD = "fd_efflite0", "diffusion.json"
NOT_INSTALLED = f"{NAME} is not measured: pip install 'ldm-vae[features]'"
MOST_COLUMNS, USUAL_COLUMNS = 12, 8


class Looks:
    """Sets of images as Gaussians of features, and the distance between two of them."""

    def __init__(self, network: features.Features) -> None:
        self.network = network

    @torch.inference_mode()
    def of(self, images: Iterable[torch.Tensor]) -> Gaussian:
        """images: pixels [B, C, H, W] in [-1, 1] and beyond, 8-bit as the protocol has it."""
        gaussian = Gaussian()
        for pixels in images:
            quantised = PINNED.quantise(pixels.float())
            device = next(self.network.trunk.parameters()).device  # type: ignore[attr-defined]
            gaussian.update(self.network.trunk(quantised.expand(-1, 3, -1, -1).to(device)).cpu())
        return gaussian

    def distance(self, one: Gaussian, other: Gaussian) -> float:
        """Frechet distance; both of at least two images."""
        size = self.network.dimensions
        return frechet_distance(*one.compute(size)[1:], *other.compute(size)[1:])


def looks(device: torch.device) -> Looks | None:
    """None where the features' weights are not installed."""
    network = features.efflite0(device)
    return None if network is None else Looks(network)


# --- of a run ---------------------------------------------------------------------------------------------------------


def record_samples(run: Path, generator: Generator, images_seen: int, count: int, batch_size: int) -> Path:
    """Write RUN/samples/images-N.png, `count` samples of the keys 0, 1, ...; returns it."""
    classes = len(generator.classes)
    columns = classes if 2 <= classes <= MOST_COLUMNS else USUAL_COLUMNS
    images = torch.cat(list(generator.batches(count, batch_size)))
    path = run / "samples" / f"images-{images_seen:09d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(make_grid(PINNED.quantise(images), nrow=columns, padding=4, pad_value=255), path)
    found = {
        "grids": sorted(picture.name for picture in path.parent.glob("images-*.png")),
        "columns": columns,
        "classes": [str(value) for value in generator.classes] if columns == classes else [],
        "count": count,
        "side": images.shape[3],
        "sampling": generator.sampling.model_dump(),
    }
    _record(run, found)
    return path


def record_distances(
    run: Path, generator: Generator, stored: Iterable[torch.Tensor], count: int, batch_size: int
) -> dict[str, Any] | None:
    """Measure samples, fields and noise against the decoded `stored` latents [c, h, w], `count` images each; None where
    the features are not installed."""
    judge = looks(generator.device)
    if judge is None:
        return None
    latents = torch.stack(list(stored))
    noise = generator.noise(range(count))

    def decoded(scaled: torch.Tensor) -> Iterator[torch.Tensor]:
        return map(generator.decode, torch.split(scaled, batch_size))

    reference = judge.of(decoded(latents))
    sets = {
        "samples": generator.batches(count, batch_size),
        "field": decoded(field(noise, field_statistics(latents))),
        "noise": decoded(noise),
    }
    distances: dict[str, Any] = {"metric": NAME, "n": count}
    distances |= {name: judge.distance(reference, judge.of(images)) for name, images in sets.items()}
    _record(run, {"distances": distances})
    return distances


def in_words(distances: dict[str, Any] | None) -> str:
    """What the program prints of `record_distances`."""
    if distances is None:
        return NOT_INSTALLED
    return (
        f"{NAME} to decoded latents of the store, {distances['n']:,} images each: samples {distances['samples']:.1f}, "
        f"Gaussian fields {distances['field']:.1f}, noise {distances['noise']:.1f}"
    )


def _record(run: Path, found: dict[str, Any]) -> None:
    path = run / "report" / RECORD
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result.write(path, before | found)


def field_statistics(latents: torch.Tensor) -> dict[str, Any]:
    """latents [N, c, h, w] => what `metrics.samples.field` takes."""
    return {
        "mean": latents.double().mean(dim=(0, 2, 3)).tolist(),
        "std": latents.double().std(dim=(0, 2, 3)).tolist(),
        "spectrum": {"latents": (radial_spectrum(latents) / len(latents)).tolist()},
    }
