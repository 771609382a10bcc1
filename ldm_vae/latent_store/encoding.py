"""The guarded encode: pixels => stored tensors, the same bits for a sample whatever shares its batch.

`vae.encode` of a sample is bit-identical in any company, but not across batch shapes or thread counts. So every batch
is padded to one shape and every encoding thread computes with one torch thread. Several such threads, each with a batch
of its own, use all cores better than torch's threads do (measured: 1.5 times on two cores) and cannot change a bit.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm_vae import keyed, latents
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_store.manifest import (
    SAFETENSORS_DTYPES,
    TENSOR_NAMES,
    ComputeDtype,
    Settings,
    StorageDtype,
    StoreKind,
)
from ldm_vae.latent_store.shards import TensorSpec
from ldm_vae.latents import Moments

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Rows = dict[str, npt.NDArray[Any]]


def default_workers(processes: int) -> int:
    """Decoding processes of one of `processes` processes: its share of the cores, at most 8."""
    return min(8, max(1, _cores() // processes))


def default_threads(processes: int, device: torch.device) -> int:
    """Encoding threads: on a GPU two, so that one launches while the other waits for its result."""
    return max(1, _cores() // processes) if device.type == "cpu" else 2


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """A VAE's encoder with everything that decides what a stored value is."""

    def __init__(
        self,
        vae: Any,
        *,
        batch_size: int,
        store: StoreKind = "moments",
        dtype: StorageDtype = "fp16",
        mixed_precision: ComputeDtype = "no",
        device: torch.device | str = "cpu",
    ) -> None:
        self.vae = vae.to(device)
        self.batch_size, self.store, self.dtype, self.mixed_precision = batch_size, store, dtype, mixed_precision
        self.device = torch.device(device)

    @property
    def settings(self) -> Settings:
        """What byte identity depends on besides the identity."""
        kind = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return Settings(
            batch_size=self.batch_size,
            threads=1,
            device=kind,
            memory_format="contiguous",
            torch=torch.__version__.partition("+")[0],
        )

    def specs(self, shape: tuple[int, ...]) -> list[TensorSpec]:
        """The stored tensors of a latent shape (c, h, w)."""
        return [TensorSpec(name, SAFETENSORS_DTYPES[self.dtype], shape) for name in TENSOR_NAMES[self.store]]

    def __call__(self, images: Sequence[torch.Tensor], keys: Sequence[int]) -> tuple[Rows, list[str | None]]:
        """uint8 images [C, H, W] of one size => rows in storage dtype, and why a sample cannot be stored (or None).

        A sample whose moments are not finite is encoded once more in fp32; if that does not help, or the storage dtype
        cannot hold it, it has a reason. `keys` are the samples' indices: noise of `store="sample"` is drawn by them.
        """
        parts = [
            self._batch(images[first : first + self.batch_size], keys[first : first + self.batch_size])
            for first in range(0, len(images), self.batch_size)
        ]
        rows = {name: np.concatenate([part[0][name] for part in parts]) for name in TENSOR_NAMES[self.store]}
        return rows, [reason for part in parts for reason in part[1]]

    def _batch(self, images: Sequence[torch.Tensor], keys: Sequence[int]) -> tuple[Rows, list[str | None]]:
        pixels = torch.zeros((self.batch_size, *images[0].shape), dtype=torch.uint8)
        torch.stack(list(images), out=pixels[: len(images)])
        stored = self._stored(self._moments(pixels, self.mixed_precision), keys)
        bad = _not_finite(stored)
        if self.mixed_precision != "no" and bad.any():
            again = self._stored(self._moments(pixels, "no"), keys)
            stored = {name: torch.where(bad.view(-1, 1, 1, 1), again[name], value) for name, value in stored.items()}
            bad = _not_finite(stored)
        reason = f"the encoder gives NaN or infinity for it in fp32, or values that {self.dtype} cannot hold"
        reasons = [reason if flag else None for flag in bad.tolist()]
        return {name: _numpy(value) for name, value in stored.items()}, reasons

    @torch.no_grad()
    def _moments(self, pixels: torch.Tensor, precision: ComputeDtype) -> Moments:
        autocast: Any = contextlib.nullcontext()
        if precision != "no":
            autocast = torch.autocast(self.device.type, TORCH_DTYPES[precision])
        with autocast:
            moments = latents.encode(self.vae, to_pixels(pixels.to(self.device, non_blocking=True)))
        return Moments(moments.mean.cpu(), moments.logvar.cpu())

    def _stored(self, moments: Moments, keys: Sequence[int]) -> dict[str, torch.Tensor]:
        count = len(keys)
        mean, logvar = moments.mean[:count], moments.logvar[:count]
        if self.store == "sample":
            noise = keyed.normal(0, "stored sample", keys, mean.shape[1:])
            tensors = {"sample": Moments(mean, logvar).sample(noise)}
        else:
            tensors = {"mean": mean, "logvar": logvar} if self.store == "moments" else {"mean": mean}
        return {name: value.to(TORCH_DTYPES[self.dtype]) for name, value in tensors.items()}


def _not_finite(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B] bool."""
    finite = [torch.isfinite(value).flatten(1).all(dim=1) for value in stored.values()]
    return ~torch.stack(finite).all(dim=0)


def _numpy(value: torch.Tensor) -> npt.NDArray[Any]:
    value = value.contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
