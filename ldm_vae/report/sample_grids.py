"""Grids of a generator's samples on the page: of each label a strip beside originals of it, or the whole grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.report import images
from ldm_vae.report.charts import MOST, compact

Json = dict[str, Any]

OF_LABEL = 4  # samples of a label, where the picture has more


def shown(folder: Path, found: Json) -> Json | None:
    """RUN/samples as `found` has it; None where there are none."""
    named = [images.inside(folder / "samples", name) for name in found["grids"]]
    grids = [path for path in named if path.is_file()]
    if not grids:
        return None
    pictures = [
        {"uri": images.embed(path), "caption": f"at {compact(_images_of(path))} images", "width": _width(path)}
        for path in grids
    ]
    originals = images.inside(folder / "samples", "originals.png")
    beside = originals if originals.is_file() else None
    return {
        "last": pictures[-1],
        "earlier": pictures[:-1],
        "labels": _by_label(grids[-1], beside, found) if found.get("labels") else [],
        "classes": len(found["classes"]),
        "originals": images.embed(beside) if beside and not found["classes"] else None,
    }


def _by_label(grid: Path, originals: Path | None, found: Json) -> list[Json]:
    """Samples of one label and originals of it, a strip of at most OF_LABEL each, for at most MOST labels."""
    across, down = found["width"] + found["gap"], found["height"] + found["strip"] + found["gap"]
    boxes: dict[str, list[tuple[int, int, int, int]]] = {}
    for key, label in enumerate(found["labels"]):
        row, column = divmod(key, found["columns"])
        left, top = found["gap"] + column * across, found["gap"] + found["strip"] + row * down
        boxes.setdefault(label, []).append((left, top, found["width"], found["height"]))
    return [
        {
            "name": label,
            "samples": images.cut_out(grid, own[:OF_LABEL]),
            "originals": images.cut_out(originals, own[:OF_LABEL]) if originals else None,
        }
        for label, own in list(boxes.items())[:MOST]
    ]


def _images_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _width(path: Path) -> int:
    """Pixels of the picture, enlarged so far that a phone still has them all."""
    side = images.read_pixels(path).shape[1]
    return int(side * max(1, round(720 / side)))
