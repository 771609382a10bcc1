"""Preview factors: the linear map from latents to colours that ComfyUI-like programs draw while a model samples.

    colours [B, 3, h, w] in [-1, 1] = factors^T latents + bias

fitted by least squares against the image averaged over f x f pixels. `latents` are the normalised ones, as the
diffusion model sees them: that is what a sampler has in hand.

Legend: B batch, C image channels, c latent channels, h w latent positions, f pixels per latent position.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store.read.dataset import LatentDataset

FILE = "latent_preview.json"

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Preview:
    """Linear preview: factors [c][C] and bias [C], in the names and order that ComfyUI's latent formats use; r2: the
    share of the colours' variance that they explain."""

    factors: list[list[float]]
    bias: list[float]
    r2: float
    images: int

    def colours(self, scaled: torch.Tensor) -> torch.Tensor:
        """normalised latents [B, c, h, w] => colours [B, C, h, w] in [-1, 1] (and beyond)."""
        factors, bias = torch.tensor(self.factors), torch.tensor(self.bias)
        return torch.einsum("bchw,cd->bdhw", scaled.float(), factors) + bias.view(-1, 1, 1)

    def to_json(self) -> str:
        """Contents of latent_preview.json."""
        tree = {"latent_rgb_factors": self.factors, "latent_rgb_factors_bias": self.bias}
        return json.dumps(tree | {"r2": self.r2, "images": self.images}, indent=1) + "\n"

    def lines(self) -> list[str]:
        """Lines for the terminal, to be pasted."""
        rows = [f"    [{', '.join(f'{value:.4f}' for value in row)}]," for row in self.factors]
        bias = ", ".join(f"{value:.4f}" for value in self.bias)
        head = f"preview factors (they explain {self.r2:.1%} of the colours, {self.images} images):"
        return [head, "latent_rgb_factors = [", *rows, "]", f"latent_rgb_factors_bias = [{bias}]"]


def fit_preview(pairs: Iterable[Pair]) -> Preview:
    """Least squares in fp64 over pairs of normalised latents [B, c, h, w] and colours [B, C, h, w].

    Raises:
        WorkError: there was no pair.
    """
    gram = moment = squares = None
    images = 0
    for scaled, colours in pairs:
        ones = torch.ones_like(scaled[:, :1])
        x = _rows(torch.cat([scaled, ones], dim=1))
        y = _rows(colours)
        parts = x.T @ x, x.T @ y, torch.stack([y.sum(0), y.square().sum(0)])
        if gram is None or moment is None or squares is None:
            gram, moment, squares = parts
        else:
            gram, moment, squares = gram + parts[0], moment + parts[1], squares + parts[2]
        images += len(scaled)
    if gram is None or moment is None or squares is None:
        raise WorkError("preview factors: there was no usable image")
    solution = torch.linalg.lstsq(gram, moment, driver="gelsd").solution  # [c + 1, C]; a dead channel is no error
    count = gram[-1, -1]
    residual = squares[1] - (2 * solution * moment).sum(0) + (solution * (gram @ solution)).sum(0)
    total = squares[1] - squares[0].square() / count
    r2 = 1 - float(residual.sum() / total.sum().clamp_min(1e-30))
    return Preview(solution[:-1].tolist(), solution[-1].tolist(), r2, images)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.double().cpu().permute(0, 2, 3, 1).reshape(-1, values.shape[1])


@torch.no_grad()
def pairs_of_images(vae: Any, pixel_batches: Iterable[torch.Tensor], normalisation: Normalisation) -> Iterator[Pair]:
    """pixels [B, C, H, W] in [-1, 1] => (normalised latents, colours)."""
    for pixels in pixel_batches:
        mean = finite.encode(vae, pixels.to(vae.device, vae.dtype)).mean
        yield _pair(vae, normalisation.apply(mean), pixels)


@torch.no_grad()
def pairs_of_store(vae: Any, store: Path, normalisation: Normalisation, *, limit: int = 64) -> Iterator[Pair]:
    """Latents of a store, at most `limit` of them; the colours are those of their decoded images."""
    data = LatentDataset(store, sample=False, normalisation=normalisation)
    for place in range(min(limit, len(data))):
        scaled = data[place * len(data) // min(limit, len(data))]["latents"]
        pixels = data.decode(scaled[None], vae).clamp(-1, 1)
        yield _pair(vae, scaled[None], pixels)


def _pair(vae: Any, scaled: torch.Tensor, pixels: torch.Tensor) -> Pair:
    """Raises UsageError for clips, whose latent frames stand for several, and for sounds."""
    if scaled.ndim != 4:
        what = "sounds" if scaled.ndim == 3 else "clips"
        raise UsageError(f"--preview: colours are fitted on images, and these are {what}; leave it out")
    return scaled, functional.avg_pool2d(pixels, downsampling_factor(vae))
