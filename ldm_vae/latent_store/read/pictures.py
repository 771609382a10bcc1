"""Latents => PNG files, or one sheet of them: the first look at a store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm_vae.core.ownership import own
from ldm_vae.core.pictures import png, save, to_image
from ldm_vae.core.progress import Progress
from ldm_vae.data.alpha import visible
from ldm_vae.data.transforms import decoding_of, to_uint8
from ldm_vae.latent_store.read.batch import Item
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.perceptual import spectrogram


def decode_to_png(
    dataset: LatentDataset,
    vae: Any,
    out: str | Path,
    indices: Sequence[int],
    batch_size: int = 8,
    codebooks: int | None = None,
) -> int:
    """Decode samples into OUT/INDEX-KEY.png, codes from the first so many codebooks (default: all); returns how many.

    Raises:
        UsageError: another launch is at work on OUT.
        WorkError: OUT cannot be written.
    """
    folder = Path(out)
    with own(folder, "OUT"), Progress(total=len(indices), desc="decode", unit="img") as bar:
        for chunk in _of_one_shape(dataset, indices, batch_size):
            for item, picture in decoded(dataset, vae, chunk, codebooks):
                save(to_uint8(picture), folder / f"{file_name(item)}.png")
            bar.update(len(chunk))
    return len(indices)


def file_name(item: Item) -> str:
    """Name of a sample's file without its ending: index and key."""
    stem = re.sub(r"[^\w.-]+", "_", Path(item["key"]).stem).strip("._")[-80:]
    return f"{int(item['index']):08d}-{stem}"


def contact_sheet(dataset: LatentDataset, vae: Any, count: int = 16, columns: int = 4, side: int = 128) -> bytes:
    """Samples from all over a dataset, decoded, each within side x side pixels, of sounds the
    spectrograms: one PNG."""
    chosen = [place * len(dataset) // count for place in range(count)] if len(dataset) > count else range(len(dataset))
    decoding = decoding_of(dataset.manifest.identity.preprocessing)
    sheet = Image.new("RGB", (side * min(columns, len(chosen)), side * -(-len(chosen) // columns)))
    for place, index in enumerate(chosen):
        ((_, picture),) = decoded(dataset, vae, [index])
        if decoding is not None and decoding.sample_rate is not None:
            shown = 255 * spectrogram.picture(picture, decoding.sample_rate)[None]
        else:
            picture = to_uint8(picture[:, 0] if picture.ndim == 4 else picture)  # a clip's first frame
            shown = visible(picture, decoding is not None and decoding.alpha)
        image = to_image(shown).convert("RGB")
        image.thumbnail((side, side))
        sheet.paste(image, (place % columns * side, place // columns * side))
    return png(sheet)


def decoded(
    dataset: LatentDataset, vae: Any, indices: Sequence[int], codebooks: int | None = None
) -> list[tuple[Item, torch.Tensor]]:
    """Items of one shape, each with its pixels [C, H, W] or [C, T, H, W], or samples [C, L], fp32 and not clamped, on
    the CPU; codes from the first so many codebooks (default: all)."""
    items = [dataset[index] for index in indices]
    name = "latents" if dataset.manifest.identity.codes is None else "indices"
    stacked = torch.stack([item[name] for item in items])
    stacked = stacked if codebooks is None else stacked[:, :codebooks]
    return list(zip(items, dataset.decode(stacked, vae).cpu(), strict=True))


def _of_one_shape(dataset: LatentDataset, indices: Sequence[int], size: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    for index in indices:
        if chunks and len(chunks[-1]) < size and dataset.shape(chunks[-1][0]) == dataset.shape(index):
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks
