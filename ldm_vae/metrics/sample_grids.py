"""Grids of a generator's samples in a run: its label above each, a column for each class where these are few.

    RUN/samples/images-000012345.png   a grid of samples
    RUN/samples/originals.png          as many images of the store, decoded: the same labels at the same places

Legend: N images, C image channels, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.core.pictures import labelled, save, sheet
from ldm_vae.data.alpha import visible
from ldm_vae.metrics.protocol import PINNED

MOST_COLUMNS, USUAL_COLUMNS, GAP = 12, 8, 4


def write(
    run: Path, images_seen: int, images: torch.Tensor, names: Sequence[str], *, alpha: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Write RUN/samples/images-N.png, samples [N, C, H, W] of every class (their `names`) in turn; its path, and what
    the page has to know of the grids."""
    path = run / "samples" / f"images-{images_seen:09d}.png"
    layout = grid(path, images, names, alpha=alpha)
    return path, {
        "grids": sorted(picture.name for picture in path.parent.glob("images-*.png")),
        "classes": list(names),
        "labels": [names[key % len(names)] for key in range(len(images))] if names else [],
        "count": len(images),
        **layout,
    }


def record_originals(run: Path, generator: Any, stored: torch.Tensor, batch_size: int, names: Sequence[str]) -> None:
    """Write RUN/samples/originals.png: [N, ...] of the store, decoded, in the order of samples."""
    images = torch.cat([generator.decode(part) for part in torch.split(stored, batch_size)])
    grid(run / "samples" / "originals.png", images, names, alpha=has_alpha(generator.vae))


def grid(path: Path, images: torch.Tensor, names: Sequence[str], *, alpha: bool = False) -> dict[str, int]:
    """Write images [N, C, H, W], every class in turn, or clips [N, C, T, H, W] as one that moves; returns where they
    are in the picture."""
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
