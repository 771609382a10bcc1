"""`eval.speed encode`: a folder of photographs into a store, beside the encoder alone and beside the usual script.

- `encode`: `write_store` at 256 px with a narrow f8 network, all that it does: decoding, encoding, statistics, files;
- `bare_encoder`: `vae.encode` in a loop over tensors in memory, at the same batch, with torch's own threads;
- `encode_CLASS`, `bare_encoder_CLASS`: the same of a class that is deterministic (`dc`), whose latents become patches
  (`flux2`) and that encodes frame by frame (`wan`);
- `encode_waiting`: the same `write_store`, driven with a stand-in encoder. A CPU cannot overlap with itself: this one
  waits, off the interpreter lock and one batch at a time as an accelerator does, for 0.7 of the time that the usual
  script needs to decode and save an image; `waiting_encoder` is that wait alone;
- `usual_script`: batch 1, decode, encode, np.savez per image, one after the other, with the same stand-in: what
  sd-scripts does at its default `vae_batch_size`;
- `sd_scripts`, `simpletuner`: the order of work in kohya-ss/sd-scripts (`new_cache_latents`, February 2026, batches of
  8) and in bghira/SimpleTuner (`VAECache`, August 2026, reads of 25, batches of 4), with the same stand-in: threads
  read a piece, then it is resized, encoded and written, a file an image; then comes the next piece.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from torchvision.transforms.v2 import functional

from ldm_vae.autoencoder import latents
from ldm_vae.data.source import Record, Source, open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_store import write_store
from ldm_vae.latent_store.write.encoder import default_threads

from . import networks
from .data import write_photographs
from .timing import interleave, row

RESOLUTION, BATCH = 256, 8
WIDTHS = (32, 64, 64, 64)
PHOTOGRAPHS = 48
SIZE = (1024, 768)
WAITING_IMAGES = 1536  # enough that the start of the decoding processes does not count
SCRIPT_IMAGES = 48
SHARE = 0.7
CLASSES = ("dc", "flux2", "wan")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder) / "photographs", PHOTOGRAPHS, SIZE)
        source = open_source(Path(folder) / "photographs")
        encoders = {"": network(WIDTHS)} | {f"_{name}": networks.network(name) for name in CLASSES}
        rows = [
            one
            for suffix, vae in encoders.items()
            for one in _computing(Path(folder), source, options.rounds, suffix, vae)
        ]
        return [*rows, *_waiting(Path(folder), source, files, options.rounds)]


# --- an encoder that computes -----------------------------------------------------------------------------------------


def _computing(folder: Path, source: Source, rounds: int, suffix: str, vae: Any) -> list[dict[str, Any]]:
    pixels = to_pixels(torch.randint(0, 256, (BATCH, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8))

    @torch.no_grad()
    def bare() -> None:
        for _ in range(PHOTOGRAPHS // BATCH):
            latents.encode(vae, pixels)

    threads = default_threads(1, torch.device("cpu"))
    alone, whole = f"bare_encoder{suffix}", f"encode{suffix}"
    times = interleave(
        {alone: bare, whole: lambda: write(vae, source, folder, encode_threads=threads, num_workers=1)}, rounds, whole
    )
    rate = {name: {"images_per_s": PHOTOGRAPHS / float(np.median(values))} for name, values in times.items()}
    return [row(alone, times, alone, None, **rate[alone]), row(whole, times, whole, alone, **rate[whole])]


def network(widths: tuple[int, ...], groups: int = 32) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=groups,
    )
    return vae.eval().requires_grad_(False)


def write(vae: Any, source: Source, folder: Path, **how: Any) -> None:
    """`write_store` of the benchmark's images, from its beginning."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    write_store(vae, source, store, **{"resolution": RESOLUTION, "batch_size": BATCH} | how)


# --- an encoder that waits --------------------------------------------------------------------------------------------


class WaitingEncoder(AutoencoderKL):
    """Moments after a wait; one batch at a time, as on an accelerator, and without the interpreter lock."""

    seconds = 0.0  # per image

    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> Any:
        with _DEVICE:
            time.sleep(self.seconds * len(pixels))
        moments = pixels.new_zeros(len(pixels), 8, *(side // 8 for side in pixels.shape[2:]))
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments))


_DEVICE = threading.Lock()


class Repeated:
    """A source that gives its images over and over, under other keys."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length, self.decoding = source, length, source.decoding

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        return f"{index // len(self._source)}/{self._source.key(index % len(self._source))}"

    def __getitem__(self, index: int) -> Record:
        return self._source[index % len(self._source)]


def _waiting(folder: Path, source: Source, files: list[Path], rounds: int) -> list[dict[str, Any]]:
    vae = WaitingEncoder.from_config(network(WIDTHS).config)
    vae.seconds = 0.0
    _script(vae, files, folder)  # once for the caches
    started = time.perf_counter()
    _script(vae, files, folder)
    vae.seconds = SHARE * (time.perf_counter() - started) / SCRIPT_IMAGES
    many = Repeated(source, WAITING_IMAGES)

    def wait() -> None:
        for _ in range(SCRIPT_IMAGES // BATCH):
            vae.encode(torch.zeros(BATCH, 3, RESOLUTION, RESOLUTION))

    others = {
        "usual_script": lambda: _script(vae, files, folder),
        "sd_scripts": lambda: _pieces(vae, files, folder, read=BATCH, batch=BATCH, save=_save_npz),
        "simpletuner": lambda: _pieces(vae, files, folder, read=25, batch=4, save=_save_pt),
    }
    contenders = {
        "waiting_encoder": wait,
        "encode_waiting": lambda: write(vae, many, folder, encode_threads=2, num_workers=2),  # 2 threads: as on a GPU
        **others,
    }
    times = interleave(contenders, rounds, "encode waiting")
    images = dict.fromkeys(contenders, SCRIPT_IMAGES) | {"encode_waiting": WAITING_IMAGES}
    each = {name: [value / images[name] for value in values] for name, values in times.items()}
    rate = {name: {"images_per_s": 1 / float(np.median(values))} for name, values in each.items()}
    rows = [row(name, each, name, None, **rate[name]) for name in contenders if name != "encode_waiting"]
    return rows + [
        row("encode_waiting", each, "encode_waiting", to, **rate["encode_waiting"])
        for to in ("waiting_encoder", *others)
    ]


@torch.no_grad()
def _script(vae: Any, files: list[Path], folder: Path) -> None:
    """The work of scripts that cache latents, with Pillow and torchvision."""
    for file in itertools.islice(files, SCRIPT_IMAGES):
        moments = vae.encode(_pixels(_opened(file))[None]).latent_dist.parameters
        np.savez(folder / f"{file.stem}.npz", moments=moments[0].half().numpy())


@torch.no_grad()
def _pieces(vae: Any, files: list[Path], folder: Path, *, read: int, batch: int, save: Callable[..., None]) -> None:
    """A piece of `read` files by as many threads as there are cores, then its encoding and its files."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, read)) as threads:
        for start in range(0, SCRIPT_IMAGES, read):
            piece = files[start : min(start + read, SCRIPT_IMAGES)]
            images = list(threads.map(_opened, piece))
            for first in range(0, len(piece), batch):
                pixels = torch.stack([_pixels(image) for image in images[first : first + batch]])
                z = vae.encode(pixels).latent_dist.sample()
                for file, latent in zip(piece[first : first + batch], z, strict=True):
                    save(folder / file.stem, latent)


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _pixels(image: Image.Image) -> torch.Tensor:
    small = functional.center_crop(functional.resize(image, [RESOLUTION]), [RESOLUTION, RESOLUTION])
    pixels: torch.Tensor = functional.to_dtype(functional.to_image(small), torch.float32, scale=True) * 2 - 1
    return pixels


def _save_npz(stem: Path, latent: torch.Tensor) -> None:
    np.savez(f"{stem}.npz", latents=latent.float().numpy())


def _save_pt(stem: Path, latent: torch.Tensor) -> None:
    torch.save(latent.clone(), f"{stem}.pt")
