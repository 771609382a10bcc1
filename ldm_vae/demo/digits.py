"""The handwritten digits of scikit-learn (extra `demo`): 1,797 grey images of 8 px in 17 levels, small enough for a
textbook VAE on a CPU. (E. Alpaydin and C. Kaynak, UCI repository, CC BY 4.0.)

    OUT/{train,heldout}/LABEL/0000.png    1,437 and 360 images, every fifth held out
    OUT/ATTRIBUTION.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError

LEVELS = 17
EVERY = 5  # of the images is held out; their order in the package is by writer, so both parts have all of them
MARK = "ATTRIBUTION.md"
CREDIT = """\
Optical Recognition of Handwritten Digits, by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as shipped by scikit-learn: 8 x 8 px, 17 levels.
"""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """(images [1797, 1, 8, 8] in [-1, 1], labels [1797]). Raises WorkError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise WorkError("digits: needs scikit-learn: pip install 'ldm-vae[demo]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / (LEVELS - 1) * 2 - 1
    return images, torch.from_numpy(found.target)


def held_out(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(training, held-out) rows of [N, ...]."""
    chosen = torch.arange(len(images)) % EVERY == 0
    return images[~chosen], images[chosen]


def prepare_digits(out: Path) -> str:
    """Write the folder `out`; returns a sentence that says what is there.

    Raises:
        UsageError: `out` holds something else.
        WorkError: scikit-learn is not installed.
    """
    _free(out)
    images, labels = digits()
    with atomic_io.whole_folder(out.absolute(), _free) as folder:
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            part = folder / ("heldout" if index % EVERY == 0 else "train") / str(label)
            part.mkdir(parents=True, exist_ok=True)
            grey = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
            Image.fromarray(grey).save(part / f"{index:04d}.png")
        (folder / MARK).write_text(CREDIT, encoding="utf-8")
    return f"{out}: {len(images) - len(images[::EVERY])} digits to train on, {len(images[::EVERY])} held out"


def _free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise UsageError(f"OUT {out}: expected a new folder or one of these digits, it is something else")
