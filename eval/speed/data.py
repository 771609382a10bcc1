"""`eval.speed data`: from JPEG files to normalised float batches, per core.

- `data`: ldm_vae's training loader, exact decoding, then `to_pixels`;
- `data_jpeg_draft`: the same with `data.jpeg_draft`;
- `plain_pipeline`: what training scripts do: datasets' `with_transform`, torchvision on Pillow images, DataLoader;
- `bare_decode`: Pillow's decoding alone, the floor.

All in this process with one thread, in CPU seconds, so a figure is that of one core. The files are photographs of
scikit-image and scikit-learn, enlarged with a little grain to about one megapixel (an enlarged photograph without grain
decodes faster than a real one), square and 4:3, and once more at about 256 px.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from ldm_vae.core.errors import WorkError
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import TransformConfig, to_pixels

from .timing import interleave, row

RESOLUTION = 256
QUALITIES = (75, 85, 95)  # of JPEG: what programs write by default lies between
BATCH = 16
# width, height; jpeg_draft decodes at a quarter where a quarter is enough for the resolution, else at a half
SIZES = {"": (1024, 1024), "_4x3": (1184, 888), "_256px": (320, 256)}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [found for kind in SIZES for found in _measure(Path(folder) / f"photographs{kind}", kind, options)]
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    files = write_photographs(folder, (8 if kind == "_256px" else 3) * BATCH, SIZES[kind])
    ours = _ours(folder, jpeg_draft=False)
    draft = _ours(folder, jpeg_draft=True)
    plain = _plain(files)
    steps = len(files) // BATCH
    contenders = {
        "plain_pipeline": lambda: _consume(plain, steps),
        "data": lambda: _consume(ours, steps),
        "data_jpeg_draft": lambda: _consume(draft, steps),
        "bare_decode": lambda: _decode(files),
    }
    times = interleave(contenders, options.rounds, f"data{kind}", clock=time.process_time)
    size = statistics.mean(file.stat().st_size for file in files)
    rows = []
    for contender, own in times.items():
        to = None if contender == "plain_pipeline" else "plain_pipeline"
        rate = len(files) / statistics.median(own)
        rows.append(row(f"{contender}{kind}", times, contender, to, images_per_s=rate, mean_file_bytes=round(size)))
    return rows


def write_photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """`count` JPEG files of about `size`, from the photographs that scikit-image and scikit-learn bring."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise WorkError("eval.speed data needs photographs: pip install scikit-image scikit-learn") from error
    names = ("astronaut", "coffee", "chelsea", "rocket")
    photographs = [getattr(skimage.data, name)() for name in names]
    photographs += [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    folder.mkdir(parents=True)
    files = []
    for number in range(count):
        draw = np.random.default_rng(number)
        # a part of the photograph, another one each time, enlarged or reduced to the size asked for
        image = Image.fromarray(photographs[number % len(photographs)])
        width, height = (round(side * draw.uniform(0.7, 1.0)) for side in image.size)
        left, top = (int(draw.integers(0, room + 1)) for room in (image.width - width, image.height - height))
        image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.LANCZOS)
        grainy = np.asarray(image, dtype=np.float32) + draw.normal(0, 3, (size[1], size[0], 1))
        file = folder / f"{number:04d}.jpg"
        buffer = io.BytesIO()
        quality = QUALITIES[number // len(photographs) % len(QUALITIES)]
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        file.write_bytes(buffer.getvalue())
        files.append(file)
    return files


def _ours(folder: Path, jpeg_draft: bool) -> Iterator[torch.Tensor]:
    source = open_source(folder, jpeg_draft=jpeg_draft)
    loader = training_loader(source, TransformConfig(), RESOLUTION, seed=0, batch_size=BATCH)
    return (to_pixels(batch.pixels) for batch in loader)


def _plain(files: list[Path]) -> Iterator[torch.Tensor]:
    import datasets

    transform = transforms.Compose(
        [
            transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomCrop(RESOLUTION),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def prepare(examples: dict[str, Any]) -> dict[str, Any]:
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        return examples

    def collate(examples: list[dict[str, Any]]) -> torch.Tensor:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return pixels.to(memory_format=torch.contiguous_format).float()

    dataset = datasets.Dataset.from_dict({"image": list(map(str, files))}).cast_column("image", datasets.Image())
    loader = DataLoader(dataset.with_transform(prepare), batch_size=BATCH, shuffle=True, collate_fn=collate)
    while True:
        yield from loader


def _consume(batches: Iterator[torch.Tensor], steps: int) -> None:
    for batch in islice(batches, steps):
        assert batch.shape == (BATCH, 3, RESOLUTION, RESOLUTION) and batch.dtype == torch.float32


def _decode(files: list[Path]) -> None:
    for file in files:
        with Image.open(file) as image:
            image.load()
