"""The demo's photographs: real ones that two packages ship (extra `demo`), cut into training and held-out crops.

    OUT/photographs/{train,heldout}/NAME.png    whole, short side 256 px
    OUT/train/NAME/0000.png ...                 96 px tiles of the training photographs, half overlapping, two scales
    OUT/heldout/NAME/0000.png ...               64 px tiles of other photographs, not overlapping
    OUT/ATTRIBUTION.md

Whole photographs are held out: crops of one photograph on both sides would be a leak.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ldm_vae.errors import UsageError, WorkError

SHORT_SIDE = 256  # of a whole photograph; tiles are cut at this scale and, where the original allows, at twice it
TRAIN_TILE, HELDOUT_TILE = 96, 64


@dataclass(frozen=True)
class Photograph:
    """Where a photograph comes from, and what its package says of it."""

    name: str
    package: str
    file: str
    held_out: bool
    credit: str


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", "data/astronaut.png", False, "Eileen Collins; NASA, public domain"),
    Photograph("china", "sklearn", "datasets/images/china.jpg", False, "danielbuechele on Flickr, CC BY 2.0"),
    Photograph("coffee", "skimage", "data/coffee.png", False, "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"),
    Photograph("rocket", "skimage", "data/rocket.jpg", False, "DSCOVR on Falcon 9; SpaceX, public domain"),
    Photograph("retina", "skimage", "data/retina.jpg", False, "Fundus of a normal left eye; Haggstrom, CC0"),
    Photograph("hubble", "skimage", "data/hubble_deep_field.jpg", False, "eXtreme Deep Field; NASA, public domain"),
    Photograph("chelsea", "skimage", "data/chelsea.png", True, "Chelsea the cat; Stefan van der Walt, CC0"),
    Photograph("flower", "sklearn", "datasets/images/flower.jpg", True, "vultilion on Flickr, CC BY 2.0"),
)


def prepare_demo(out: Path) -> str:
    """Write the photographs and crops to `out`; returns a sentence. An `out` that is whole is left as it is.

    Raises:
        UsageError: `out` holds something else.
        WorkError: a package is not installed.
    """
    done = out / "ATTRIBUTION.md"
    if not done.is_file():
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"OUT {out}: expected a new folder or one of these photographs, it holds something else")
        beside = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            for photograph in tqdm(PHOTOGRAPHS, desc="photographs", unit="photo", disable=None):
                _cut(photograph, beside)
            (beside / done.name).write_text(_attribution(), encoding="utf-8")
            if out.exists():
                out.rmdir()
            out.parent.mkdir(parents=True, exist_ok=True)
            beside.rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    counts = {side: sum(1 for _ in (out / side).rglob("*.png")) for side in ("photographs", "train", "heldout")}
    return f"{out}: {counts['photographs']} photographs, {counts['train']} training crops, {counts['heldout']} held out"


def _cut(photograph: Photograph, out: Path) -> None:
    side = "heldout" if photograph.held_out else "train"
    with Image.open(_locate(photograph)) as file:
        original = file.convert("RGB")
    whole = _resize(original, SHORT_SIDE)
    folder = out / "photographs" / side
    folder.mkdir(parents=True, exist_ok=True)
    whole.save(folder / f"{photograph.name}.png")
    if photograph.held_out:
        tiles = _tiles(whole, HELDOUT_TILE, HELDOUT_TILE)
    else:
        tiles = _tiles(whole, TRAIN_TILE, TRAIN_TILE // 2)
        if min(original.size) >= 1.5 * SHORT_SIDE:
            tiles += _tiles(_resize(original, 2 * SHORT_SIDE), TRAIN_TILE, TRAIN_TILE // 2)
    folder = out / side / photograph.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, tile in enumerate(tiles):
        tile.save(folder / f"{number:04d}.png")


def _locate(photograph: Photograph) -> Path:
    spec = importlib.util.find_spec(photograph.package)
    if spec is None or spec.origin is None:
        raise WorkError("the demo's photographs come with scikit-image and scikit-learn: pip install 'ldm-vae[demo]'")
    path = Path(spec.origin).parent / photograph.file
    if not path.is_file():
        raise WorkError(f"{photograph.package} does not ship {photograph.file} in this version")
    return path


def _resize(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    width, height = (round(side * scale) // 8 * 8 for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _tiles(image: Image.Image, size: int, stride: int) -> list[Image.Image]:
    width, height = image.size
    corners = [(x, y) for y in range(0, height - size + 1, stride) for x in range(0, width - size + 1, stride)]
    return [image.crop((x, y, x + size, y + size)) for x, y in corners]


def _attribution() -> str:
    lines = ["# Photographs of the demo", "", "As stated by the packages that ship them; resized and cut.", ""]
    for photograph in PHOTOGRAPHS:
        side = "held out" if photograph.held_out else "training"
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
        lines.append(f"- {photograph.name} ({side}): {photograph.credit} (from {package})")
    return "\n".join(lines) + "\n"
