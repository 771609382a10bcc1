"""Images of independent discrete factors with known probabilities: a distribution that can be enumerated.

    OUT/factors.csv              each of the 1,152 images: its number, the value of each factor, its probability
    OUT/{train,heldout}/0000.png 4,096 and 1,024 of them, drawn by key with those probabilities; 16 px, RGB
    OUT/{train,heldout}/metadata.jsonl    the number of each, and its factors

One shape on black, drawn without a soft edge: all values are 0 or 255, and no two of the images are equal. The
probability of an image is the product of those of its factors, so the entropy of the data is the sum of theirs.

Legend: N images, F factors.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_vae.core import atomic_io, rng
from ldm_vae.core.errors import UsageError

SIDE, STEP = 16, 2  # of an image, and between two positions, in pixels
SHAPES = ("square", "disc", "triangle", "cross")
COLOURS = ((255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255))
SIDES = (6, 4)  # of a shape
# probability of each value, not one of them uniform
FACTORS: dict[str, tuple[float, ...]] = {
    "shape": (0.4, 0.3, 0.2, 0.1),
    "colour": (0.4, 0.3, 0.2, 0.1),
    "scale": (0.7, 0.3),
    "x": (0.05, 0.1, 0.2, 0.3, 0.2, 0.15),
    "y": (0.3, 0.25, 0.2, 0.1, 0.1, 0.05),
}
PARTS = {"train": 4096, "heldout": 1024}
TABLE = "factors.csv"


def values() -> torch.Tensor:
    """Values of the factors of every image, int64 [N, F]; the last factor varies fastest."""
    return torch.tensor(list(itertools.product(*(range(len(own)) for own in FACTORS.values()))))


def probabilities() -> torch.Tensor:
    """Probability of every image, fp64 [N]."""
    tables = [torch.tensor(own, dtype=torch.float64) for own in FACTORS.values()]
    return torch.stack([own[column] for own, column in zip(tables, values().T, strict=True)]).prod(dim=0)


def images() -> torch.Tensor:
    """Every image, uint8 [N, 3, 16, 16]."""
    found = torch.zeros(len(values()), 3, SIDE, SIDE, dtype=torch.uint8)
    for canvas, (shape, colour, scale, x, y) in zip(found, values().tolist(), strict=True):
        mask, side = _mask(SHAPES[shape], SIDES[scale]), SIDES[scale]
        # a small shape stands in the middle of a large one's place
        left, top = (STEP * at + (max(SIDES) - side) // 2 for at in (x, y))
        canvas[:, top : top + side, left : left + side] = mask * torch.tensor(COLOURS[colour]).view(3, 1, 1)
    return found


def _mask(shape: str, side: int) -> torch.Tensor:
    """0 or 1 [side, side]."""
    at = torch.arange(side) - (side - 1) / 2
    across, down = at[None].expand(side, side), at[:, None].expand(side, side)
    inside = {
        "square": torch.ones(side, side),
        "disc": across.square() + down.square() <= (side / 2) ** 2,
        "triangle": 2 * across.abs() <= down + side / 2 + 0.5,
        "cross": across.abs() == down.abs(),
    }
    return inside[shape].to(torch.uint8)


def entropy_bits() -> float:
    """Entropy of the data in bits per image: no model's mean -log2 p is below it."""
    return -sum(p * math.log2(p) for own in FACTORS.values() for p in own)


def draws(part: str, count: int) -> torch.Tensor:
    """Numbers of the images of a part, int64 [count], each drawn by its own key."""
    cumulative = probabilities().cumsum(dim=0)
    uniform = [rng.generator(0, f"factors {part}", key).random() for key in range(count)]
    # times the total, which is 1 but for rounding
    return torch.searchsorted(cumulative, torch.tensor(uniform).double() * cumulative[-1], right=True)


def prepare_factors(out: Path) -> str:
    """Write the folder `out`; returns a sentence that says what is there.

    Raises:
        UsageError: `out` holds something else.
    """
    _free(out)
    pictures, rows = images().permute(0, 2, 3, 1).numpy(), values().tolist()
    with atomic_io.whole_folder(out.absolute(), _free) as folder:
        for part, count in PARTS.items():
            (folder / part).mkdir()
            lines = []
            for key, number in enumerate(draws(part, count).tolist()):
                name = f"{key:04d}.png"
                Image.fromarray(np.ascontiguousarray(pictures[number])).save(folder / part / name)
                own = dict(zip(FACTORS, rows[number], strict=True))
                lines.append(json.dumps({"file_name": name, "number": number} | own) + "\n")
            (folder / part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / TABLE).write_text(_table(), encoding="utf-8")
    return f"{out}: {PARTS['train']:,} images to train on, {PARTS['heldout']:,} held out, of {len(rows):,} that exist"


def _table() -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", *FACTORS, "probability"])
    for number, (own, p) in enumerate(zip(values().tolist(), probabilities().tolist(), strict=True)):
        writer.writerow([number, *own, repr(p)])
    return text.getvalue()


def _free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / TABLE).is_file()):
        raise UsageError(f"OUT {out}: expected a new folder or one of these images, it is something else")
