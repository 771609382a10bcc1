"""Frames of evaluated clips side by side: above the originals, below them each VAE's reconstructions.

    python -m eval.filmstrip runs/demo_video/film runs/demo_video/moving OUT.png --frames 3

RESULT is what eval.reconstruction wrote of clips. The first clip of each is shown, by frames that are evenly apart from
its first to its last; all results are of equally many VAEs. Pixels are kept, or repeated where a result's are fewer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser
from ldm_vae.core.validation import as_written
from ldm_vae.metrics.pictures import FOLDER, INDEX
from ldm_vae.report.contents import read_contents
from ldm_vae.report.images import film_of, inside, read_pixels

Strip = npt.NDArray[np.uint8]
GAP, WIDER = 4, 16  # white pixels between frames, and between results


def rows_of(result: Path, frames: int) -> Strip:
    """The chosen frames of the first clip => [rows, frames, H, W, 3]: the original, then each VAE's."""
    shown, home = read_contents(result).pictures, result / FOLDER
    if not shown:
        raise UsageError(f"RESULT {result}: expected pictures of an evaluation, got none")
    with as_written(home / INDEX):
        names = [f"{shown[0]['name']}.original.png", *(vae["reconstruction"] for vae in shown[0]["vaes"])]
        paths = [inside(home, name) for name in names]
        length = film_of(paths[0]).frames
        if length < frames:
            raise UsageError(f"frames: expected at most those of a clip, got {frames} of the {length} of {result}")
        chosen = np.linspace(0, length - 1, frames).round().astype(int)
        films = [read_pixels(path) for path in paths]
        return np.stack([film.reshape(length, -1, *film.shape[1:])[chosen] for film in films]).astype(np.uint8)


def strip(results: list[Strip]) -> Image.Image:
    """One picture of all: a row for the originals and one for each VAE."""
    rows = len(results[0])
    if any(len(one) != rows for one in results):
        counts = ", ".join(str(len(one) - 1) for one in results)
        raise UsageError(f"RESULT: expected results of equally many VAEs, got {counts}")
    side = max(one.shape[2] for one in results)
    parts = [one.repeat(side // one.shape[2], axis=2).repeat(side // one.shape[2], axis=3) for one in results]
    widths = [one.shape[1] * (one.shape[3] + GAP) - GAP for one in parts]
    picture = Image.new("RGB", (sum(widths) + WIDER * (len(parts) - 1), rows * (side + GAP) - GAP), "white")
    left = 0
    for part, width in zip(parts, widths, strict=True):
        for row in range(rows):
            for number, frame in enumerate(part[row]):
                picture.paste(Image.fromarray(frame), (left + number * (part.shape[3] + GAP), row * (side + GAP)))
        left += width + WIDER
    return picture


def main() -> None:
    parser = Parser(program="eval.filmstrip", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="what eval.reconstruction wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the PNG file")
    parser.add_argument("--frames", type=int, default=3, help="how many of each clip are shown (3)")
    options = parser.parse_args()
    if options.frames < 1:
        raise UsageError(f"frames: expected at least 1, got {options.frames}")
    picture = strip([rows_of(result, options.frames) for result in options.results])
    atomic_io.replace(options.out, lambda file: picture.save(file, "PNG"))
    print(f"wrote {options.out}: {picture.width} x {picture.height} px")


if __name__ == "__main__":
    run_program(main)
