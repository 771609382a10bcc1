"""The guarded encode: crops => stored tensors, the same bits for a sample whatever shares its batch.

`vae.encode` of a sample is bit-identical in any company, but not across batch shapes or thread counts. So every batch
is padded to one shape and every encoding thread computes with one torch thread. Several such threads, each with a batch
of its own, use all cores better than torch's threads do (measured: 1.5 times on two cores) and cannot change a bit.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.clip_stream import encode_clip
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import downsampling_factor, latent_size
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.lengths import check_frames
from ldm_vae.core import rng
from ldm_vae.core.errors import WorkError
from ldm_vae.data.transforms import to_pixels, to_values
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    PIXELS,
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    crop_of,
    crops_of,
    is_flipped,
    tensor_name,
)
from ldm_vae.latent_store.format.manifest import Settings
from ldm_vae.latent_store.format.shards import TensorSpec
from ldm_vae.latent_store.write.sample_stream import Ready
from ldm_vae.latent_store.write.tiled_encode import encode_tiled

CLIP_PART = 17  # frames of a clip that are on the device at a time

logger = logging.getLogger(__name__)

TORCH_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "uint16": torch.uint16,
    "int32": torch.int32,
}

EncodedRows = dict[str, npt.NDArray[Any]]
Reason = str | None


def default_workers(processes: int) -> int:
    """Decoding processes of one of `processes` processes: its share of the cores, at most 8."""
    return min(8, max(1, _cores() // processes))


def default_threads(processes: int, device: torch.device) -> int:
    """Encoding threads: on a GPU two, so that one launches while the other waits for its result."""
    return max(1, _cores() // processes) if device.type == "cpu" else 2


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """A VAE's encoder with everything that decides what a stored value is. Several threads may call it at once."""

    def __init__(self, vae: Any, identity: Identity, *, batch_size: int, device: torch.device | str = "cpu") -> None:
        self.vae = vae.to(device)
        self.identity, self.batch_size, self.device = identity, batch_size, torch.device(device)
        self._names = TENSOR_NAMES[identity.store]
        self._dtype = TORCH_DTYPES[identity.dtype]
        self._factor = downsampling_factor(vae)
        self._lock, self._own = threading.Lock(), threading.local()

    @property
    def settings(self) -> Settings:
        """Settings that byte identity depends on besides the identity."""
        return Settings(
            batch_size=self.batch_size,
            threads=1,
            device="cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            memory_format="contiguous",
            torch=torch.__version__.partition("+")[0],
        )

    def specs(self, channels: int, *size: int) -> list[TensorSpec]:
        """The stored tensors of crops [C, H, W], of clips [C, T, H, W], or of excerpts [C, L]."""
        check_frames(self.vae, size[0] if len(size) > 2 else 1)
        shape = latent_size(self.vae, *size)
        if self.identity.store == "indices":
            books = self.identity.codebooks
            shape = shape[1:] if books is None else (books, *shape[1:])
        dtype = SAFETENSORS_DTYPES[self.identity.dtype]
        views = self.identity.views
        specs = [TensorSpec(tensor_name(name, view), dtype, shape) for view in views for name in self._names]
        if self.identity.pixels:
            specs += [TensorSpec(tensor_name(PIXELS, c), "U8", (channels, *size)) for c in crops_of(views)]
        return specs

    def __call__(self, samples: Sequence[Ready]) -> tuple[EncodedRows, list[Reason]]:
        """Samples of one crop size => rows in storage dtype, and why a sample cannot be stored (or None).

        A sample whose moments are not finite is encoded once more in fp32; if that does not help, or the storage dtype
        cannot hold it, it has a reason.
        """
        rows: EncodedRows = {}
        reasons: list[Reason] = [None] * len(samples)
        for number, view in enumerate(self.identity.views):
            images = [sample.crops[crop_of(view)] for sample in samples]
            if is_flipped(view):
                images = [image.flip(-1) for image in images]
            keys = [(sample.index, sample.group[0], number) for sample in samples]
            stored, bad = self._encode(images, keys)
            rows |= {tensor_name(name, view): _numpy(value) for name, value in stored.items()}
            reason = (
                f"the encoder gives NaN or infinity for it in fp32, or values that {self.identity.dtype} cannot hold"
            )
            reasons = [reason if flag else before for flag, before in zip(bad.tolist(), reasons, strict=True)]
        if self.identity.pixels:
            for crop in crops_of(self.identity.views):
                rows[tensor_name(PIXELS, crop)] = torch.stack([sample.crops[crop] for sample in samples]).numpy()
        return rows, reasons

    def _encode(
        self, images: Sequence[torch.Tensor], keys: Sequence[tuple[int, int, int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """uint8 images [C, H, W], clips [C, T, H, W], or excerpts float32 [C, L] => stored tensors [n, ...], and which
        are not finite [n]; batch by batch."""
        parts: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        first = 0
        while first < len(images):
            size = self.batch_size
            try:
                parts.append(self._batch(images[first : first + size], keys[first : first + size], size))
                first += size
            except torch.OutOfMemoryError as error:
                # batches before it stand; this one is tried again at the smaller size, which the unit's record names
                self._halve(size, images[0], error)
        stored = {name: torch.cat([part[0][name] for part in parts]) for name in self._names}
        return stored, torch.cat([part[1] for part in parts])

    def _halve(self, tried: int, image: torch.Tensor, error: Exception) -> None:
        """Go on with half the batch, which every later unit records."""
        if tried == 1:
            what = " x ".join(map(str, image.shape[1:]))
            more = "" if image.ndim == 4 else "; --tile N encodes in parts"
            raise WorkError(f"the device has too little memory to encode one image of {what}{more}") from error
        torch.cuda.empty_cache()
        with self._lock:
            # several threads can fail at one size: the first halves it, the others find it halved
            if self.batch_size == tried:
                self.batch_size = tried // 2
                logger.warning("out of memory at batch_size %d: going on with %d", tried, self.batch_size)

    def _batch(
        self, images: Sequence[torch.Tensor], keys: Sequence[tuple[int, int, int]], size: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        # padded with black, or silence, to the one batch shape, so that a sample's bits do not depend on how many share
        # its batch
        pixels = torch.zeros((size, *images[0].shape), dtype=images[0].dtype)
        torch.stack(list(images), out=pixels[: len(images)])
        moments = self._moments(pixels, self.identity.mixed_precision)
        stored, bad = self._stored(moments, keys)
        if self.identity.mixed_precision != "no" and bad.any():
            # fp32 for the samples that overflowed alone: the others keep their bits
            again, own = self._moments(pixels, "no"), torch.cat([bad, bad.new_zeros(size - len(bad))])
            own = own.view(-1, *(1,) * (moments.mean.ndim - 1))
            mean, logvar = torch.where(own, again.mean, moments.mean), torch.where(own, again.logvar, moments.logvar)
            stored, bad = self._stored(Moments(mean, logvar), keys)
        return stored, bad

    @torch.no_grad()
    def _moments(self, pixels: torch.Tensor, precision: str) -> Moments:
        autocast: Any = contextlib.nullcontext()
        if precision != "no":
            autocast = torch.autocast(self.device.type, TORCH_DTYPES[precision])
        vae = self._network()

        def encode(part: torch.Tensor) -> Moments:
            if part.ndim < 5:
                return latents.encode(vae, to_values(part.to(self.device)))
            # a few frames at a time: of a long clip no fp32 pixels are held, nor activations where the class can
            some = (to_pixels(few.to(self.device)) for few in torch.split(part, CLIP_PART, dim=2))
            return Moments.joined([*encode_clip(vae, some)])

        with autocast:
            if self.identity.tile is None or max(pixels.shape[-2:]) <= self.identity.tile[0]:
                moments = encode(pixels)
            else:
                moments = encode_tiled(encode, pixels, *self.identity.tile, self._factor)
        return Moments(moments.mean.cpu(), moments.logvar.cpu())

    def _network(self) -> Any:
        """The network of this thread: a class of clips keeps caches in itself, so each has one, of the same weights."""
        if family_of(self.vae).signal != "video":
            return self.vae
        if not hasattr(self._own, "vae"):
            shared = {id(one): one for one in (*self.vae.parameters(), *self.vae.buffers())}
            self._own.vae = copy.deepcopy(self.vae, shared)
        return self._own.vae

    def _stored(
        self, moments: Moments, keys: Sequence[tuple[int, int, int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Stored tensors [n, ...], and of which samples they are not finite [n]."""
        mean, logvar = moments.mean[: len(keys)], moments.logvar[: len(keys)]
        if self.identity.store == "indices":
            indices = latents.nearest_codes(self.vae, mean.to(self.device)).cpu()
            return {"indices": indices.to(self._dtype)}, _not_finite({"mean": mean})  # the nearest to NaN is a number
        if self.identity.store == "sample":
            noise = rng.normal(0, "stored sample", keys, mean.shape[1:])
            tensors = {"sample": Moments(mean, logvar).sample(noise)}
        else:
            tensors = {"mean": mean, "logvar": logvar}
        stored = {name: tensors[name].to(self._dtype) for name in self._names}
        return stored, _not_finite(stored)


def _not_finite(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mark the samples that hold NaN or infinity, [B] bool."""
    finite = [torch.isfinite(value).flatten(1).all(dim=1) for value in stored.values()]
    return ~torch.stack(finite).all(dim=0)


def _numpy(value: torch.Tensor) -> npt.NDArray[Any]:
    value = value.contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
