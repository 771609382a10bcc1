"""Compare the files of `ldm-vae compress` with what the networks' likelihood says and with other coders.

    python -m eval.compression runs/textbook_vae data/digits/heldout --seen data/digits/train --output compared
    python -m eval.compression runs/vq_demo data/demo/photographs/heldout --prior runs/prior --output compared

Lossless (no --prior): bits per pixel value of one file of all images and of a file for each, without names and sizes:
this code, PNG, WebP lossless, and an adaptive coder whose context is the pixels to the left and above (order 2), which
starts from nothing or, with --seen, from the images the network was trained on. PNG and WebP of all images are one tall
picture. The negative evidence lower bound is the one that training logs.

Lossy (--prior): bits per pixel, PSNR and LPIPS (alex) of crops of --resolution. JPEG and WebP at the highest quality
that takes no more bytes than this code (or at their lowest, which may take more), and at others.

Every file of this code is decoded and compared. DIR then holds compression.json and compression.md.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.compression.bits_back import BitsBack, load_likelihood
from ldm_vae.compression.entropy_coder import categorical, coders
from ldm_vae.compression.file import decode, parts_of, read, write
from ldm_vae.compression.indices import Indices
from ldm_vae.compression.inputs import open_codec, read_images
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.pictures import to_image
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.data.named_images import find_images
from ldm_vae.data.transforms import centre_crop, to_pixels
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import ImageBatch
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.metrics.metric import Metric
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.select import build_metrics

Json = dict[str, Any]
Images = Sequence[torch.Tensor]  # uint8 [C, H, W]
CPU = torch.device("cpu")
METRICS = ("psnr", "lpips_alex")
QUALITIES = (5, 10, 20, 40, 80)  # of JPEG and WebP, beside the one at this code's rate
TALLEST = 16_383  # pixels of a side of a WebP


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.compression", description=__doc__)
    add = parser.add_argument
    add("vae", metavar="VAE", help="run of a VAE with a likelihood of levels; with --prior a VQ autoencoder")
    add("data", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of them")
    add("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--prior", metavar="RUN", help="run of a prior over the VQ autoencoder's codes")
    add("--resolution", type=int, help="lossy: side of the crops in pixels (default: whole images)")
    add("--seen", type=Path, metavar="FOLDER", help="lossless: the images that the VAE was trained on")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    lossy = options.prior is not None
    found = (compare_lossy if lossy else compare_lossless)(options)
    table = found.pop("table")
    result.write(options.output / "compression.json", found | result.command("eval.compression"))
    result.write(options.output / "compression.md", table + "\n")
    print(table)


def coded(codec: BitsBack | Indices, images: Images, *, lossless: bool) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Bytes of a file's parts, and what comes back. Raises WorkError where a lossless code is none."""
    content = write(codec, [f"{number}" for number in range(len(images))], images)
    back = decode(codec, *read(content, "FILE"), "FILE")
    if lossless and not all(torch.equal(one, other) for one, other in zip(images, back, strict=True)):
        raise WorkError("FILE: other images come back")
    return parts_of(content), back


def file_of(image: Image.Image, kind: str, **how: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


# --- lossless ---------------------------------------------------------------------------------------------------------

LOSSLESS: dict[str, tuple[str, Json]] = {
    "PNG": ("PNG", {"optimize": True}),
    "WebP, lossless": ("WEBP", {"lossless": True, "quality": 100, "method": 6}),
}
LOSSY: dict[str, tuple[str, Json]] = {
    "JPEG": ("JPEG", {"optimize": True, "progressive": True}),
    "WebP": ("WEBP", {"method": 6}),
}


def compare_lossless(options: argparse.Namespace) -> Json:
    vae, objective = load_likelihood(options.vae)
    codec = BitsBack(vae, objective)
    images = read_images(find_images(options.data), codec)
    if len({image.shape for image in images}) > 1 or images[0].shape[0] != 1:
        raise UsageError("IMAGE: expected grey images of one size, which the coders beside this one take")
    if len(images) * images[0].shape[1] > TALLEST:
        raise UsageError(f"IMAGE: expected images of at most {TALLEST:,} rows together, which a WebP has")
    batch = ImageBatch(range(len(images)), [""] * len(images), torch.stack(list(images)))
    bound = evidence_bound(vae, objective, [batch], CPU)["elbo_bits_per_dimension"]
    parts, _ = coded(codec, images, lossless=True)
    single = [coded(codec, [image], lossless=True)[0] for image in Progress(images, desc="one by one", unit="img")]

    values = sum(image.numel() for image in images)
    rows: dict[str, tuple[float, float | None]] = {
        "negative evidence lower bound": (bound, None),
        "this code": (8 * parts["images"] / values, 8 * sum(one["images"] for one in single) / values),
        "this code, with the seed": (
            8 * (parts["images"] + parts["seed"]) / values,
            8 * sum(one["images"] + one["seed"] for one in single) / values,
        ),
    }
    levels = [codec.levels_of(image)[0].numpy() for image in images]
    starts = {"order 2, from nothing": Contexts(codec.levels)}
    if options.seen is not None:
        primed = Contexts(codec.levels)
        for image in read_images(find_images([options.seen]), codec):
            primed.learn(codec.levels_of(image)[0].numpy())
        starts["order 2, having seen the training images"] = primed
    for name, start in starts.items():
        alone = sum(start.copy().bits([one]) for one in levels)
        rows[name] = (start.copy().bits(levels) / values, alone / values)
    tall = to_image(torch.cat(list(images), dim=1))
    for name, (kind, how) in LOSSLESS.items():
        one, *each = (len(file_of(picture, kind, **how)) for picture in (tall, *map(to_image, images)))
        rows[name] = (8 * one / values, 8 * sum(each) / values)
    rows["as many bits as there are levels"] = (math.log2(codec.levels),) * 2
    lines = [
        f"{len(images):,} images, {values:,} values; of this code header {parts['header']:,} bytes, seed "
        f"{parts['seed']:,}, images {parts['images']:,}: {rows['this code'][0] / bound - 1:+.2%} of the bound", "",
        "| bits per value | one file | a file for each image |", "|---|---:|---:|",
        *(f"| {name} | {one:.3f} | {'' if each is None else f'{each:.3f}'} |" for name, (one, each) in rows.items()),
    ]  # fmt: skip
    return {"images": len(images), "values": values, "bytes": parts, "bits_per_value": rows, "table": "\n".join(lines)}


class Contexts:
    """Adaptive probabilities of a level given those to the left and above, coded as they are learned.

    Counts of the longer context are added to what the shorter says, which weighs as PRIOR more (as in PPM)."""

    PRIOR = 2.0

    def __init__(self, levels: int) -> None:
        self.counts = [np.zeros((*(levels + 1,) * order, levels)) for order in range(3)]  # the last stands for outside

    def copy(self) -> Contexts:
        """The same, to learn on from."""
        twin = Contexts(self.counts[0].shape[0])
        twin.counts = [counts.copy() for counts in self.counts]
        return twin

    def learn(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Probabilities [H W, L] that were given to each value of an image [H, W] before it was seen."""
        levels = len(self.counts[0])
        padded = np.pad(image, ((1, 0), (1, 0)), constant_values=levels)
        found = []
        for place, level in np.ndenumerate(image):
            west, north = padded[place[0] + 1, place[1]], padded[place[0], place[1] + 1]
            own = [self.counts[0], self.counts[1][west], self.counts[2][west, north]]
            chances = np.full(levels, 1 / levels)
            for counts in own:
                chances = (counts + self.PRIOR * chances) / (counts.sum() + self.PRIOR)
                counts[level] += 1
            found.append(chances)
        return np.stack(found)

    def bits(self, images: Sequence[np.ndarray[Any, Any]]) -> int:
        """Bits of the coder's words for images, learned from on the way."""
        encoder = coders().queue.RangeEncoder()
        for image in images:
            encoder.encode(image.flatten().astype(np.int32), categorical(), self.learn(image))
        return int(encoder.num_bits())


# --- lossy ------------------------------------------------------------------------------------------------------------


def compare_lossy(options: argparse.Namespace) -> Json:
    codec = open_codec(options.vae, options.prior)
    assert isinstance(codec, Indices)
    images = read_images(find_images(options.data), codec)
    if options.resolution is not None:
        images = [centre_crop(image, options.resolution).pixels for image in images]
    metrics = functools.partial(build_metrics, METRICS, CPU, min(min(one.shape[1:]) for one in images))
    parts, back = coded(codec, images, lossless=False)
    crops = torch.cat([codec.crops(image) for image in images])
    none = torch.zeros(len(crops), dtype=torch.long)
    with torch.no_grad():
        nats = codec.prior.nats(crops, none, 0, range(len(crops))).sum().item()

    pixels = sum(image[0].numel() for image in images)
    rows = {"this code": (8 * parts["images"] / pixels, *measured(metrics(), images, back))}
    rows["this code with its header"] = (8 * sum(parts.values()) / pixels, *rows["this code"][1:])
    for name, (kind, how) in LOSSY.items():
        files = {q: [file_of(to_image(one), kind, quality=q, **how) for one in images] for q in range(1, 101)}
        sizes = {quality: sum(map(len, some)) for quality, some in files.items()}
        alike = max((quality for quality, size in sizes.items() if size <= sum(parts.values())), default=1)
        for quality in sorted({alike, *QUALITIES}):
            note = ", the nearest to this code's rate" if quality == alike else ""
            values = measured(metrics(), images, [opened(one) for one in files[quality]])
            rows[f"{name}, quality {quality}{note}"] = (8 * sizes[quality] / pixels, *values)
    bits = nats / math.log(2)
    lines = [
        f"{len(images):,} images, {pixels:,} pixels, {crops.numel():,} indices in {len(crops):,} crops; header "
        f"{parts['header']:,} bytes, images {parts['images']:,}: {8 * parts['images'] / bits - 1:+.3%} of -log2 p, "
        f"{bits / crops.numel():.3f} bits an index", "",
        "| | bits per pixel | PSNR (dB) | LPIPS alex |", "|---|---:|---:|---:|",
        *(f"| {name} | {rate:.3f} | {psnr:.2f} | {lpips:.3f} |" for name, (rate, psnr, lpips) in rows.items()),
    ]  # fmt: skip
    return {"images": len(images), "pixels": pixels, "bytes": parts, "log2_p": bits, "rows": rows,
            "table": "\n".join(lines)}  # fmt: skip


def opened(file: bytes) -> torch.Tensor:
    """uint8 [C, H, W] of a picture's file."""
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@torch.no_grad()
def measured(metrics: Sequence[Metric], images: Images, back: Images) -> list[float]:
    """Means of metrics over images."""
    for one, other in zip(images, back, strict=True):
        for metric in metrics:
            metric.update(PINNED.pair(to_pixels(one)[None], to_pixels(other)[None]))
    return [metric.compute().mean or math.nan for metric in metrics]


if __name__ == "__main__":
    run_program(main)
