"""Grids of a generator's samples in a run: its label above each, a column for each class where these are few.

    RUN/samples/images-000012345.png   a grid of samples
    RUN/samples/originals.png          as many images of the store, decoded: the same labels at the same places
    RUN/samples/images-000012345/      of sounds, whose grids are of spectrograms: 0000.wav, ... to listen to

Legend: N images, C channels, T frames, H W pixels, L samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.preparation import has_alpha, own_rate, recorded
from ldm_vae.core.pictures import labelled, save, sheet
from ldm_vae.data.alpha import visible
from ldm_vae.data.sounds import write_sound
from ldm_vae.metrics import result
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.perceptual import spectrogram

MOST_COLUMNS, USUAL_COLUMNS, GAP = 12, 8, 4
UNKNOWN_RATE = 44_100  # Hz, of a class whose config names none and that has no record


def record_samples(
    run: Path, record: str, generator: Any, images_seen: int, count: int, batch_size: int, names: Sequence[str]
) -> Path:
    """Write RUN/samples/images-N.png, `count` samples of the keys 0, 1, ..., of every class (their `names`) in turn;
    its path. RUN/report/`record` gets what the page has to know of the grids, and how they were sampled."""
    images = torch.cat(list(generator.batches(count, batch_size)))
    path = run / "samples" / f"images-{images_seen:09d}.png"
    layout = grid(path, images, names, generator.vae)
    found = {
        "grids": sorted(picture.name for picture in path.parent.glob("images-*.png")),
        "classes": list(names),
        "labels": [names[key % len(names)] for key in range(len(images))] if names else [],
        "count": len(images),
        "sampling": generator.sampling.model_dump(),
    }
    result.update(run / "report" / record, found | layout)
    return path


def record_originals(run: Path, generator: Any, stored: torch.Tensor, batch_size: int, names: Sequence[str]) -> None:
    """Write RUN/samples/originals.png: [N, ...] of the store, decoded, in the order of samples."""
    images = torch.cat([generator.decode(part) for part in torch.split(stored, batch_size)])
    grid(run / "samples" / "originals.png", images, names, generator.vae)


def grid(path: Path, images: torch.Tensor, names: Sequence[str], vae: Any) -> dict[str, int]:
    """Write images [N, C, H, W] that `vae` has decoded, every class in turn, clips [N, C, T, H, W] as one that moves,
    sounds [N, C, L] as spectrograms and as files; returns where they are in the picture."""
    alpha = has_alpha(vae)
    if images.ndim == 3:
        known = recorded(vae)
        rate = own_rate(vae) or (None if known is None else known.sample_rate) or UNKNOWN_RATE
        path.with_suffix("").mkdir(parents=True, exist_ok=True)
        for number, sound in enumerate(images):
            write_sound(path.with_suffix("") / f"{number:04d}.wav", sound, rate)
        levels = torch.stack([spectrogram.picture(sound, rate) for sound in images])
        images = (2 * levels - 1)[:, None].expand(-1, 3, -1, -1)
    columns = len(names) if 2 <= len(names) <= MOST_COLUMNS else USUAL_COLUMNS
    height, width = images.shape[-2:]
    sheets = []
    for frame in images.unbind(2) if images.ndim == 5 else [images]:
        shown = visible(PINNED.quantise(frame), alpha)
        if names:
            shown = labelled(shown, [names[key % len(names)] for key in range(len(shown))])
        sheets.append(sheet(shown, columns, gap=GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(torch.stack(sheets, dim=1) if images.ndim == 5 else sheets[0], path)
    return {"columns": columns, "height": height, "width": width, "gap": GAP, "strip": shown.shape[2] - height}
