"""Latents => PNG files: the first look at a store."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm_vae import publish
from ldm_vae.data.transforms import to_uint8
from ldm_vae.errors import WorkError
from ldm_vae.latent_store.reading import LatentDataset


def decode_to_png(
    dataset: LatentDataset, vae: Any, out: str | Path, indices: Sequence[int], batch_size: int = 8
) -> int:
    """Decode samples into OUT/INDEX-KEY.png; returns how many. Raises WorkError when OUT cannot be written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkError(f"OUT {folder}: cannot be made: {error.strerror}") from error
    with tqdm(total=len(indices), desc="decode", unit="img", disable=None) as bar:
        for chunk in _of_one_shape(dataset, indices, batch_size):
            items = [dataset[index] for index in chunk]
            name = "latents" if dataset.manifest.identity.codes is None else "indices"
            pictures = to_uint8(dataset.decode(torch.stack([item[name] for item in items]), vae)).cpu()
            for item, picture in zip(items, pictures, strict=True):
                stem = re.sub(r"[^\w.-]+", "_", Path(item["key"]).stem).strip("._")[-80:]
                buffer = io.BytesIO()
                _to_image(picture).save(buffer, "PNG")
                publish.replace(folder / f"{int(item['index']):08d}-{stem}.png", publish.data(buffer.getvalue()))
            bar.update(len(chunk))
    return len(indices)


def _of_one_shape(dataset: LatentDataset, indices: Sequence[int], size: int) -> list[list[int]]:
    chunks: list[list[int]] = []
    for index in indices:
        if chunks and len(chunks[-1]) < size and dataset.shape(chunks[-1][0]) == dataset.shape(index):
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def _to_image(picture: torch.Tensor) -> Image.Image:
    """uint8 [C, H, W] => a Pillow image; of more than four channels the first three."""
    channels = picture.shape[0] if picture.shape[0] in (1, 3, 4) else 3
    array = picture[:channels].permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)
