"""One pass over images, clips or sounds: reconstruct, measure, merge over ranks. Validation and
eval.reconstruction share it.

Legend: B batch, C channels, T frames, R side of an image, L samples.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.geometry import check_resolution, is_of_sounds, latent_size
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.lengths import check_frames
from ldm_vae.autoencoder.preparation import check_signal_of
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import to_values
from ldm_vae.metrics.batches import ImageBatch, image_batches, size_of
from ldm_vae.metrics.codes import code_use
from ldm_vae.metrics.linear import LinearFloor
from ldm_vae.metrics.metric import ImageMetric, Metric, Unmeasured
from ldm_vae.metrics.profile import Profile
from ldm_vae.metrics.protocol import PINNED, Pair, Protocol
from ldm_vae.metrics.ranks import gather
from ldm_vae.metrics.running import Summary
from ldm_vae.metrics.select import build_metrics, kind_of
from ldm_vae.metrics.titles import TITLES, USUAL

logger = logging.getLogger(__name__)

WORST = 10  # how many of the poorest images are kept


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation: metrics by name; images is N, of images and clips together; checksum identifies the
    evaluated pixels, whatever their order; worst holds (index, value of worst_by), poorest first; latents is Profile's
    dict; linear: metrics of a linear code, if asked for; frames: of all of them, N of images; by_frame: of clips the
    metrics of their first frames, their second, and so on; codes: the use of codes, of a network that has some."""

    metrics: dict[str, Summary]
    images: int
    checksum: str
    worst_by: str
    worst: list[tuple[int, float]]
    latents: dict[str, Any]
    linear: dict[str, Summary] = field(default_factory=dict)
    frames: int = 0
    by_frame: dict[str, list[Summary]] = field(default_factory=dict)
    codes: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {one}" for name, one in self.metrics.items())
        return f"Evaluation({self.images:,} images: {said})"


def evaluate(
    vae: Any,
    source: Source,
    *,
    resolution: int | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measure how a VAE reconstructs images, clips or sounds, by the pinned protocol (docs/evaluation.md).

    Args:
        vae: what `load_autoencoder` gave.
        source: what `open_images` gave; each image is resized and its centre cropped to `resolution`, which sounds have
            none of: they are excerpts. What cannot be read is left out, with a warning for each.
        metrics: names of `ldm_vae.metrics.select.NAMES`, or dotted paths of your modules; by default psnr, ssim and
            lpips_alex, of sounds si_sdr, snr, mel_distance and log_spectral_distance.

    Raises:
        UsageError: a metric does not exist or is of another signal, the resolution is no multiple of f, or clips or
            sounds have a length that the class would cut or pad.
        WorkError: no image can be read, weights that a metric needs cannot be had, or the network gives NaN.

    >>> from ldm_vae import evaluate, load_autoencoder, open_images
    >>> vae = load_autoencoder("my-vae")
    >>> result = evaluate(vae, open_images("photos", vae), resolution=32, metrics=["psnr"])
    >>> result.images, result.metrics["psnr"].mean > 0
    (12, True)
    """
    device, decoding = torch.device(device), source.decoding
    check_signal_of(vae, decoding, "vae", "source")
    size = size_of(decoding, resolution)
    check_resolution(size, vae)
    bad = Quarantine(len(source))
    batches = image_batches(source, None, size, batch_size=batch_size, num_workers=num_workers, quarantine=bad)
    if decoding.frames is not None:
        check_frames(vae, decoding.frames, "frames")
    chosen = build_metrics(metrics or USUAL[decoding.signal], device, size, **kind_of(decoding))
    vae = vae.to(device)
    result = evaluate_reconstruction(vae, batches, chosen, device, resolution=size, batch_size=batch_size)
    for key, reason in bad.bad.items():
        logger.warning("%s is left out: %s", key, reason)
    return result


@torch.inference_mode()
def measure(
    original: torch.Tensor,
    reconstruction: torch.Tensor,
    *,
    metrics: Sequence[str] = ("psnr", "ssim", "lpips_alex"),
    alpha: bool = False,
    sample_rate: int | None = None,
) -> dict[str, torch.Tensor]:
    """Measure pairs of images, clips or sounds at hand, by the pinned protocol: values [B], fp64, for each metric.

    Args:
        original, reconstruction: pixels [B, C, H, W] or [B, C, T, H, W] in [-1, 1] on one device; what lies beyond is
            clamped in the reconstruction, and both are rounded to 8 bits first. Or samples [B, C, L], as they are.
        metrics: names of `ldm_vae.metrics.select.NAMES` that are of single images, or dotted paths of your modules.
        alpha: the fourth channel is straight alpha.
        sample_rate: of sounds, in hertz. A sound without speech has NaN for stoi and pesq.

    Raises:
        UsageError: other shapes, originals beyond [-1, 1], no such metric, or one of whole sets.
        WorkError: weights that a metric needs cannot be had.

    >>> import torch
    >>> from ldm_vae import measure
    >>> grey = torch.full((2, 3, 64, 64), 1 / 255)  # level 128 of 8 bits
    >>> measure(grey, grey + 2 / 255, metrics=["psnr"])["psnr"].round(decimals=2)
    tensor([48.1300, 48.1300], dtype=torch.float64)
    """
    shapes = ("[B, C, H, W] or [B, C, T, H, W]", (4, 5)) if sample_rate is None else ("[B, C, L] of sounds", (3,))
    if original.ndim not in shapes[1] or original.shape != reconstruction.shape or not original.numel():
        came = f"{tuple(original.shape)} and {tuple(reconstruction.shape)}"
        raise UsageError(f"original, reconstruction: expected two tensors of one shape {shapes[0]}, got {came}")
    least, most = (float(one) for one in original.aminmax())
    if sample_rate is None and not -1 <= least <= most <= 1:
        raise UsageError(f"original: expected pixels in [-1, 1], got values from {least:g} to {most:g}")
    if sample_rate is not None and not (original.isfinite().all() and reconstruction.isfinite().all()):
        raise UsageError("original, reconstruction: expected finite samples, got NaN or infinity")
    pair = PINNED.pair(original, reconstruction, alpha=alpha)
    found: dict[str, torch.Tensor] = {}
    clips = pair.frames > 1
    side = original.shape[-1] if sample_rate is not None else min(original.shape[-2:])
    for metric in build_metrics(metrics, original.device, side, alpha=alpha, clips=clips, sample_rate=sample_rate):
        if isinstance(metric, Unmeasured):
            raise UsageError(f"metrics: {metric.name}: {metric.note}")
        if (values := metric.update(pair)) is None:
            raise UsageError(f"metrics: {metric.name} is of whole sets of images; `evaluate` measures it")
        found[metric.name] = values
    return found


@torch.inference_mode()
def evaluate_reconstruction(
    vae: Any,
    batches: Iterable[ImageBatch],
    metrics: Sequence[Metric],
    device: torch.device,
    *,
    resolution: int,
    batch_size: int,
    protocol: Protocol = PINNED,
    linear: LinearFloor | None = None,
    each: Callable[[Sequence[int], Mapping[str, torch.Tensor]], None] | None = None,
) -> Evaluation:
    """Reconstruct this rank's `batches` with `vae`, measure, and merge over all ranks (each sees the same result).

    Args:
        vae: a diffusers autoencoder on `device`, in eval mode.
        batches: the images, clips or sounds of this rank, each on exactly one rank.
        resolution: R, of sounds L.
        batch_size: every batch is padded to it, so that an image's numbers do not depend on its neighbours or on the
            number of processes.
        linear: is shown the same images.
        each: called with the indices and per-image values of every batch.

    Raises:
        UsageError: a clip or a sound has a length that the class would cut or pad.
        WorkError: no rank has an image, or the network gives NaN or infinity.
    """
    size = (resolution,) if is_of_sounds(vae) else (resolution, resolution)
    profile, codes = Profile(latent_size(vae, *size), size), code_use(vae)
    checksum, worst, images, frames = Checksum(), Worst(metrics), 0, 0
    for batch in batches:
        moments, pair = reconstruct(vae, batch, device, protocol, batch_size)
        values = {metric.name: found for metric in metrics if (found := metric.update(pair)) is not None}
        profile.update(moments, pair)
        codes.update(vae, moments.mean)
        checksum.update(batch.pixels)
        worst.update(batch.indices, values)
        images += len(batch.indices)
        frames += pair.count
        if linear is not None:
            linear.update(batch, device)
        if each is not None:
            each(batch.indices, values)

    # a rank without images takes part: collectives below need every rank
    images, frames = gather(torch.tensor([images, frames])).sum(dim=0).tolist()
    if images == 0:
        raise WorkError("evaluation: there was no image to measure")
    per_frame = {one.name: one.compute_frames() for one in metrics if isinstance(one, ImageMetric)}
    return Evaluation(
        metrics={metric.name: _summary(metric, of_frames=frames > images) for metric in metrics},
        images=images,
        checksum=checksum.compute(),
        worst_by=worst.by,
        worst=worst.compute(),
        latents=profile.compute(),
        linear={} if linear is None else linear.compute(),
        frames=frames,
        by_frame={name: found for name, found in per_frame.items() if found},
        codes=codes.over_ranks().figures(),
    )


def _summary(metric: Metric, of_frames: bool) -> Summary:
    """of_frames: the images of a metric of whole sets are frames of clips."""
    found = metric.compute()
    if of_frames and found.mean is not None and not isinstance(metric, ImageMetric):
        found = replace(found, note="; ".join(filter(None, ["of single frames: no distance of videos", found.note])))
    return found if metric.name in TITLES else replace(found, better=metric.better)


@torch.inference_mode()
def reconstruct(
    vae: Any, batch: ImageBatch, device: torch.device, protocol: Protocol = PINNED, batch_size: int = 0
) -> tuple[Moments, Pair]:
    """A batch => its moments [B, c, h, w], [B, c, t, h, w] or [B, c, n] and the pair that the protocol compares, its
    tail padded to `batch_size`.

    Raises:
        UsageError: its clips or sounds have a length that the class would cut or pad.
        WorkError: the network gives NaN or infinity; the layer and the image are named.
    """
    count = len(batch.indices)
    # filled up with the last image; the pair's indices say how many are measured
    missing = max(0, batch_size - count)
    pixels = to_values(torch.cat([batch.pixels, *[batch.pixels[-1:]] * missing]).to(device))
    keys = [*batch.keys, *[batch.keys[-1]] * missing]
    moments = finite.encode(vae, pixels, keys)
    z = moments.mean
    if protocol.posterior == "sample":
        # noise by the image's index: the same for any batch and rank
        indices = [*batch.indices, *[batch.indices[-1]] * missing]
        z = moments.sample(latents.posterior_noise(0, indices, z.shape[1:]).to(device))
    pair = protocol.pair(pixels, finite.decode(vae, z, keys), batch.indices, batch.alpha, batch.lengths)
    return Moments(moments.mean[:count], moments.logvar[:count], moments.is_point), pair


class Checksum:
    """SHA-256 of each image, added up modulo 2^256: the same for any order and any division over ranks."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, pixels: torch.Tensor) -> None:
        """pixels [B, C, R, R] or [B, C, T, R, R], uint8 or fp32, or samples [B, C, L], fp32."""
        for image in pixels:
            digest = hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes())
            self.total = (self.total + int.from_bytes(digest.digest(), "big")) % 2**256

    def compute(self) -> str:
        mine = torch.tensor(list(self.total.to_bytes(32, "big")), dtype=torch.uint8)
        everybody = [int.from_bytes(bytes(row), "big") for row in gather(mine).tolist()]
        return f"{sum(everybody) % 2**256:064x}"


class Worst:
    """The poorest images by LPIPS, or by the first per-image metric there is; memory for WORST of them."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        per_image = {metric.name: metric for metric in metrics if isinstance(metric, ImageMetric)}
        self.by = "lpips_alex" if "lpips_alex" in per_image else next(iter(per_image), "")
        self.sign = -1.0 if self.by and per_image[self.by].better == "higher" else 1.0
        self.heap: list[tuple[float, int]] = []  # (badness, -index): the least bad on top

    def update(self, indices: Sequence[int], values: Mapping[str, torch.Tensor]) -> None:
        if self.by not in values:
            return
        for index, value in zip(indices, values[self.by].tolist(), strict=True):
            if math.isnan(value):  # of a sound that has no such number
                continue
            # of equally bad ones the lower index stays, whatever the order in which they come
            heapq.heappush(self.heap, (self.sign * value, -index))
            if len(self.heap) > WORST:
                heapq.heappop(self.heap)

    def compute(self) -> list[tuple[int, float]]:
        # one shape on every rank for `gather`; NaN marks empty places
        rows = torch.full((WORST, 2), torch.nan, dtype=torch.float64)
        for row, (badness, index) in enumerate(self.heap):
            rows[row] = torch.tensor([badness, -index], dtype=torch.float64)
        found = [(badness, int(index)) for badness, index in gather(rows).flatten(0, 1).tolist() if badness == badness]
        found.sort(key=lambda item: (-item[0], item[1]))
        return [(index, self.sign * badness) for badness, index in found[:WORST]]
