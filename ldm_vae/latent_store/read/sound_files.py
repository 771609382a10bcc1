"""Latents => files of sound: the first hearing of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ldm_vae.core.ownership import own
from ldm_vae.core.progress import Progress
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.sounds import write_sound
from ldm_vae.data.transforms import decoding_of
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.latent_store.read.pictures import decoded, file_name

SoundFormat = Literal["wav", "flac"]


def decode_to_sounds(
    dataset: LatentDataset,
    vae: Any,
    out: str | Path,
    indices: Sequence[int],
    form: SoundFormat,
    batch_size: int = 8,
    codebooks: int | None = None,
) -> int:
    """Decode samples of a store of sounds into OUT/INDEX-KEY.FORM, without the silence behind what was short, codes
    from the first so many codebooks (default: all); returns how many.

    Raises:
        UsageError: another launch is at work on OUT.
        WorkError: OUT cannot be written.
    """
    folder, decoding = Path(out), decoding_of(dataset.manifest.identity.preprocessing) or Decoding()
    with own(folder, "OUT"), Progress(total=len(indices), desc="decode", unit="sounds") as bar:
        for first in range(0, len(indices), batch_size):
            items = decoded(dataset, vae, indices[first : first + batch_size], codebooks)
            for item, samples in items:
                *_, held = item["crop_box"]
                path = folder / f"{file_name(item)}.{form}"
                write_sound(path, samples[:, :held], decoding.sample_rate or 1)
            bar.update(len(items))
    return len(indices)
