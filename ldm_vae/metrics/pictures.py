"""Pictures for judging by eye: a few originals, reconstructions and latents, lossless, with their metrics. Of clips
they are animated, and metrics of each frame stand beside them. Sounds are files to listen to, as far as they go, and a
picture is a spectrogram (`perceptual/spectrogram.py`): white for 0 dB.

    pictures/pictures.json            one object a picture: name, kind, key, index, and per VAE its files and metrics
    pictures/000.original.png
    pictures/000.reconstruction.png   of the second VAE: 000.reconstruction.2.png
    pictures/000.lpips.png            where LPIPS sees a difference, if it is measured: 16 bits, 65535 for 1 and above;
                                      of a clip one frame below the other
    pictures/000.original.wav         of sounds, 32-bit floats; 000.reconstruction.wav, of the second VAE 000. ...2.wav
    pictures/000.latent.png           the latent's three largest principal components as red, green and blue

Legend: B batch, C channels, T frames, c latent channels, t h w latent positions, n of sounds, R side of an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.autoencoder import signals
from ldm_vae.core import atomic_io
from ldm_vae.core.ownership import mark
from ldm_vae.core.pictures import png, save
from ldm_vae.data.alpha import visible
from ldm_vae.data.sounds import write_sound
from ldm_vae.data.source import Source
from ldm_vae.metrics.batches import ImageBatch, image_batches
from ldm_vae.metrics.evaluate import reconstruct
from ldm_vae.metrics.metric import ImageMetric, Metric
from ldm_vae.metrics.protocol import PINNED, Pair, Protocol
from ldm_vae.perceptual import spectrogram

FOLDER, INDEX = "pictures", "pictures.json"
STRIP = 16  # pixels of height of a sound's latent, whose width is n


@dataclass
class Picture:
    """One image: name of its files, kind (shown or worst, of sounds also median or best), key and index in the
    source, what each VAE made of it."""

    name: str
    kind: str
    key: str
    index: int
    vaes: list[dict[str, Any]] = field(default_factory=list)


class Pictures:
    """Collects pictures in an empty folder; `finish` writes their index."""

    def __init__(self, folder: Path, rate: int | None = None) -> None:
        """rate: of sounds, in hertz."""
        self.folder, self.rate = folder, rate
        mark(folder)
        self.pictures: dict[int, Picture] = {}

    def add(
        self,
        vae: Any,
        batches: Iterable[ImageBatch],
        metrics: Sequence[Metric],
        device: torch.device,
        *,
        kinds: dict[int, str],
        batch_size: int,
        protocol: Protocol = PINNED,
    ) -> None:
        """Reconstruct the images of `batches` with one more VAE; kinds maps an index to a picture's kind."""
        means: list[torch.Tensor] = []
        added: list[tuple[Path, int, int]] = []
        for batch in batches:
            moments, pair = reconstruct(vae, batch, device, protocol, batch_size)
            per_image = [m for m in metrics if isinstance(m, ImageMetric) and m.applies(pair)]
            values = {m.name: m.of_frames(pair).tolist() for m in per_image}
            maps = next((pair.mean(m.where) for m in per_image if m.where is not None), None)
            before, after = (self._shown(one, pair) for one in (pair.original, pair.reconstruction))
            for row, (index, key) in enumerate(zip(batch.indices, batch.keys, strict=True)):
                picture = self._picture(index, key, kinds[index], _one(before, row, pair.frames))
                nth = f".{len(picture.vaes) + 1}" if picture.vaes else ""
                files = {kind: f"{picture.name}.{kind}{nth}.png" for kind in ("reconstruction", "latent")}
                save(_one(after, row, pair.frames), self.folder / files["reconstruction"])
                if maps is not None:
                    files["lpips"] = f"{picture.name}.lpips{nth}.png"
                    # of 8 bits a good reconstruction, a few thousandths, would have one level or two
                    where = _one(maps, row, pair.frames)[0].flatten(0, -2)
                    levels = (65535 * where.clamp(0, 1)).round().cpu().numpy().astype(np.uint16)
                    atomic_io.replace(self.folder / files["lpips"], atomic_io.data(png(Image.fromarray(levels))))
                if self.rate is not None and pair.lengths is not None:
                    files["sound"] = f"{picture.name}.reconstruction{nth}.wav"
                    names = f"{picture.name}.original.wav", files["sound"]
                    for name, sounds in zip(names, (pair.original, pair.reconstruction), strict=True):
                        write_sound(self.folder / name, sounds[row, :, : pair.lengths[row]].cpu(), self.rate)
                measured = {name: fmean(found[row]) for name, found in values.items() if not isnan(found[row][0])}
                picture.vaes.append({**files, "metrics": measured})
                if pair.frames > 1:
                    curves = {name: found[row] for name, found in values.items() if len(found[row]) > 1}
                    picture.vaes[-1]["by_frame"] = curves
                wide = moments.mean.shape[-1]
                if pair.lengths is not None:  # without what is of the silence alone
                    wide = -(-wide * pair.lengths[row] // pair.original.shape[2])
                added.append((self.folder / files["latent"], moments.mean.shape[2:-2].numel(), wide))
            mean = signals.frames_of(moments.mean)
            means.append((mean[:, :, None].expand(-1, -1, STRIP, -1) if mean.ndim == 3 else mean).cpu())
        if means:
            # one basis for all of them
            colours = torch.split(principal_colours(torch.cat(means)), [frames for _, frames, _ in added])
            for (path, frames, wide), found in zip(added, colours, strict=True):
                save(_one(found, 0, frames)[..., :wide], path)

    def _shown(self, seen: torch.Tensor, pair: Pair) -> torch.Tensor:
        """Images, frames, or the spectrograms of sounds, on the 0..255 scale."""
        if self.rate is None or pair.lengths is None:
            return visible(seen, pair.alpha)
        own = zip(seen, pair.lengths, strict=False)
        return torch.stack([255 * spectrogram.picture(sound[:, :length], self.rate)[None] for sound, length in own])

    def _picture(self, index: int, key: str, kind: str, original: torch.Tensor) -> Picture:
        if index not in self.pictures:
            picture = Picture(f"{len(self.pictures):03d}", kind, key, index)
            save(original, self.folder / f"{picture.name}.original.png")
            self.pictures[index] = picture
        return self.pictures[index]

    def finish(self) -> None:
        rows = [asdict(picture) for picture in self.pictures.values()]
        (self.folder / INDEX).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _one(frames: torch.Tensor, row: int, count: int) -> torch.Tensor:
    """Frames [B*T, C, H, W], count T of each clip => a clip of them [C, T, H, W]; of images one [C, H, W]."""
    own = frames[row * count : (row + 1) * count]
    return own[0] if count == 1 else own.transpose(0, 1)


def keep_pictures(
    output: Path,
    vaes: Sequence[Any],
    source: Source,
    kinds: dict[int, str],
    metrics: Sequence[Metric],
    device: torch.device,
    *,
    resolution: int,
    batch_size: int,
    protocol: Protocol = PINNED,
) -> None:
    """Write output/pictures in the place of earlier ones: what each of `vaes` makes of the images whose indices `kinds`
    gives a kind."""
    with atomic_io.whole_folder(output / FOLDER, free=atomic_io.anything) as folder:
        pictures = Pictures(folder, source.decoding.sample_rate)
        for vae in vaes:
            chosen = image_batches(source, list(kinds), resolution, batch_size=batch_size, protocol=protocol)
            home = next(vae.parameters()).device
            pictures.add(vae.to(device), chosen, metrics, device, kinds=kinds, batch_size=batch_size, protocol=protocol)
            vae.to(home)
        pictures.finish()


def principal_colours(means: torch.Tensor) -> torch.Tensor:
    """means [B, c, h, w] => [B, 3, h, w] on the 0..255 scale: their three largest principal components as colours.

    One basis for all images, so that equal colours are equal latents; 98 % of each component fill its range.
    """
    count, channels, height, width = means.shape
    rows = means.double().permute(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(dim=0)
    _, basis = torch.linalg.eigh(rows.T @ rows)  # ascending
    parts = rows @ basis.flip(1)[:, :3]
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    # a percentile of ordered values: torch.quantile refuses more than 16 M of them
    ordered = parts.sort(dim=0).values
    last = len(parts) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    scaled = 255 * (parts - low) / (high - low).clamp(min=1e-12)
    return scaled.clamp(0, 255).reshape(count, height, width, 3).permute(0, 3, 1, 2)
