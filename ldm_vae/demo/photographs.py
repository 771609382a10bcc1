"""The demo's photographs: real ones that two packages ship (extra `demo`), cut into training and held-out crops.

    OUT/photographs/{train,heldout}/NAME.png    whole, short side 256 px
    OUT/train/NAME/0000.png ...                 96 px tiles of the training photographs, half overlapping, two scales
    OUT/heldout/NAME/0000.png ...               64 px tiles of other photographs, not overlapping
    OUT/ATTRIBUTION.md

Whole photographs are held out: crops of one photograph on both sides would be a leak.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import own_name
from ldm_vae.core.progress import Progress

SHORT_SIDE = 256  # of a whole photograph; tiles are cut at this scale and, where the original allows, at twice it
TRAIN_TILE, HELDOUT_TILE = 96, 64
MARK = "ATTRIBUTION.md"
CC_BY = "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/)"
SKIMAGE_DATA = "https://gitlab.com/scikit-image/data"


@dataclass(frozen=True)
class Photograph:
    """Source of a photograph, and what its package says of it."""

    name: str
    package: str
    file: str
    held_out: bool
    credit: str
    source: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "scikit-image",
        "skimage/data/astronaut.png",
        False,
        "Eileen Collins, by NASA; public domain",
        "https://flic.kr/p/r9qvLn",
    ),
    Photograph(
        "china",
        "scikit-learn",
        "sklearn/datasets/images/china.jpg",
        False,
        f"by danielbuechele on Flickr; {CC_BY}",
        "https://www.flickr.com/photos/danielbuechele/6061409035/",
    ),
    Photograph(
        "coffee",
        "scikit-image",
        "skimage/data/coffee.png",
        True,
        "by Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0",
        SKIMAGE_DATA,
    ),
    Photograph(
        "rocket",
        "scikit-image",
        "skimage/data/rocket.jpg",
        False,
        "DSCOVR on Falcon 9, by SpaceX; public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/",
    ),
    Photograph(
        "retina",
        "scikit-image",
        "skimage/data/retina.jpg",
        False,
        "fundus of a normal left eye, by Mikael Häggström; CC0",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    Photograph(
        "hubble",
        "scikit-image",
        "skimage/data/hubble_deep_field.jpg",
        False,
        "Hubble eXtreme Deep Field, by NASA; public domain",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    Photograph(
        "tissue",
        "scikit-image",
        "skimage/data/ihc.png",
        False,
        "stained colonic glands, by the Center for Microscopy And Molecular Imaging; no known copyright restrictions",
        SKIMAGE_DATA,
    ),
    Photograph(
        "chelsea",
        "scikit-image",
        "skimage/data/chelsea.png",
        True,
        "Chelsea the cat, by Stefan van der Walt; CC0",
        SKIMAGE_DATA,
    ),
    Photograph(
        "flower",
        "scikit-learn",
        "sklearn/datasets/images/flower.jpg",
        False,
        f"by vultilion on Flickr; {CC_BY}",
        "https://www.flickr.com/photos/vultilion/6056698931/",
    ),
)


def prepare_demo(out: Path) -> str:
    """Write the photographs and crops to `out`; returns a sentence. An `out` that is whole is left as it is.

    Raises:
        UsageError: `out` is or holds something else.
        WorkError: a package is not installed, or `out` cannot be written.
    """
    folder = out.absolute()  # `.` has no name to write beside
    try:
        with own_name(folder):  # who waited for another launch finds its photographs
            if not (folder / MARK).is_file():
                _write(folder)
        counts = {side: sum(1 for _ in (folder / side).rglob("*.png")) for side in ("photographs", "train", "heldout")}
    except OSError as error:
        raise WorkError(f"the photographs cannot be written: {error}") from error
    return f"{out}: {counts['photographs']} photographs, {counts['train']} training crops, {counts['heldout']} held out"


def _write(out: Path) -> None:
    """The whole folder beside `out`, then under its name: what is there is whole."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"OUT {out}: expected a new folder or one of these photographs, it is something else")
    folder = atomic_io.beside(out)
    try:
        for photograph in Progress(PHOTOGRAPHS, desc="photographs", unit="photo"):
            _cut(photograph, folder)
        (folder / MARK).write_text(_attribution(), encoding="utf-8")
        atomic_io.put(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    package, _, file = photograph.file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise WorkError(
            "the demo's photographs come with scikit-image and scikit-learn, and "
            f"{photograph.package} is not installed: pip install 'ldm-vae[demo]'"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise WorkError(f"the installed version of {photograph.package} does not ship {file}")
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
    lines = ["# Photographs of the demo", ""]
    lines += ["Authors and licences as stated by the packages that ship them. Resized, and cut into crops.", ""]
    for each in PHOTOGRAPHS:
        side = "held out" if each.held_out else "training"
        lines.append(f"- {each.name} ({side}): {each.credit}; {each.source}; shipped by {each.package}")
    return "\n".join(lines) + "\n"
