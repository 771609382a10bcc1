"""Cut-outs: anti-aliased shapes with soft edges on transparent ground, as RGBA PNG.

python tests/helpers/cut_outs.py FOLDER [COUNT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FINE = 4  # subpixels a side, for the anti-aliasing


def cut_out(draw: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 4], uint8: a blob or a polygon in a gradient of colours; noise where it cannot be seen."""
    mask = Image.new("L", (FINE * side, FINE * side))
    corners = FINE * side * (0.5 + 0.42 * _ring(draw, int(draw.integers(3, 9))))
    if draw.random() < 0.5:
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        ImageDraw.Draw(mask).ellipse((left, top, right, bottom), fill=255)
    else:
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    soft = mask.filter(ImageFilter.GaussianBlur(FINE * draw.uniform(0.0, side / 20)))
    alpha = np.asarray(soft.resize((side, side), Image.Resampling.BOX), dtype=np.float64) * draw.uniform(0.6, 1.0)
    ends = Image.fromarray(draw.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    colour = np.asarray(ends.resize((side, side), Image.Resampling.BICUBIC)).copy()
    alpha = alpha.round().astype(np.uint8)
    colour[alpha == 0] = draw.integers(0, 256, (int((alpha == 0).sum()), 3))
    return np.dstack([colour, alpha])


def _ring(draw: np.random.Generator, count: int) -> np.ndarray:
    angles = np.sort(draw.uniform(0, 2 * np.pi, count)) + 0.3
    radii = draw.uniform(0.5, 1.0, count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def write_cut_outs(folder: Path, count: int, side: int = 64, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(cut_out(draw, side)).save(folder / f"cut_{number:04d}.png")
    return folder


if __name__ == "__main__":
    write_cut_outs(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 256)
