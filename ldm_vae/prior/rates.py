"""Rates of a prior: bits of held-out codes, beside those of independent codes, and the distortion that they buy.

    RUN/report/prior.json            which grids there are, how they were sampled, and the rates
    RUN/samples/independent.png      decoded codes that are drawn each by the frequencies of its position

A rate is exact where the prior's likelihood is; of kind masked it is a bound (`ldm_vae/priors/masked.py`). Bits of
codes are what an ideal entropy coder needs for them; the pixels that they decode to differ from the original's by the
distortion, so bits per pixel are no likelihood of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.autoencoder.geometry import is_of_sounds
from ldm_vae.autoencoder.preparation import has_alpha, own_rate
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.metrics import psnr, result, sample_grids
from ldm_vae.metrics.batches import share_of
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.running import Running, Summary
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.independent import Independent, Uses
from ldm_vae.run.store_training import StoredSamples

RECORD = "prior.json"
COUNTED = 8192  # images whose codes give the frequencies of independent codes
NO_PIXELS = "the distortion is not measured: the store has no pixels, which `ldm-vae encode --pixels` keeps"

Json = dict[str, Any]


def _batches(
    samples: StoredSamples, keys: Sequence[int], count: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Sequence[int]]]:
    for start in range(0, len(keys), batch_size):
        some = keys[start : start + batch_size]
        yield *samples.labelled(some, count), some


@torch.no_grad()
def validate(
    generator: CodeGenerator, samples: StoredSamples, count: int, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Bits per index and per pixel of `count` images of a store, or all that it has; shared out over the ranks."""
    prior, running, count = generator.prior, Running(), samples.at_most(count)
    mine = share_of(accelerator.process_index, accelerator.num_processes, range(count), batch_size)
    for indices, labels, keys in _batches(samples, mine, count, batch_size):
        indices, labels = indices.to(accelerator.device), labels.to(accelerator.device)
        running.update(prior.nats(indices, labels, samples.seed, keys).cpu() / math.log(2))
    bits = running.over_ranks().summary().mean
    assert bits is not None
    # of an estimated bound the name says so, wherever the log is read
    name = "validation/bits" if prior.is_exact else "validation/bound_bits"
    size = math.prod(samples.shape)
    part = "sample" if is_of_sounds(generator.vae) else "pixel"
    return {f"{name}_per_index": bits / size, f"{name}_per_{part}": bits / generator.image_pixels()}


@torch.no_grad()
def record_rates(
    run: Path, generator: CodeGenerator, train: StoredSamples, held_out: StoredSamples, count: int, batch_size: int,
    pictures: int,
) -> Json:  # fmt: skip
    """Measure `count` held-out images, or all that there are, and draw `pictures` of independent codes; what
    RUN/report/prior.json then has under `rates`."""
    total, count = train.at_most(COUNTED), held_out.at_most(count)
    counted = (indices for indices, _, _ in _batches(train, range(total), total, batch_size))
    independent = Independent(counted, generator.codes, generator.shape)
    rows = {name: Running() for name in ("prior", "position", "overall")}
    uses = Uses(generator.shape[0], generator.codes)
    for indices, labels, keys in _batches(held_out, range(count), count, batch_size):
        given, label = indices.to(generator.device), labels.to(generator.device)
        rows["prior"].update(generator.prior.nats(given, label, held_out.seed, keys).cpu())
        rows["position"].update(independent.nats(indices, independent.position))
        rows["overall"].update(independent.nats(indices, independent.overall))
        uses.update(indices)
    picture = generator.decode(independent.sample(generator.seed, range(pictures)))
    sample_grids.grid(run / "samples" / "independent.png", picture, train.names, generator.vae)
    distortion = _distortion(held_out.dataset, generator.vae, count, batch_size)
    size = math.prod(generator.shape)
    rates = {
        "is_exact": generator.prior.is_exact,
        "held_out": held_out is not train,
        "images": count,
        "indices": size,
        "pixels": generator.image_pixels(),
        "sample_rate": own_rate(generator.vae),
        "uniform": math.log2(generator.codes),
        "fitted": uses.entropy() / math.log(2),
        "bits_per_index": {name: _scaled(found.summary(), 1 / math.log(2) / size) for name, found in rows.items()},
        "psnr": None if distortion is None else distortion.to_json(),
    }
    result.update(run / "report" / RECORD, {"rates": rates})
    return rates


def _scaled(summary: Summary, factor: float) -> Json:
    assert summary.mean is not None
    ends = None if summary.ci95 is None else [factor * end for end in summary.ci95]
    return {"mean": factor * summary.mean, "ci95": ends, "n": summary.n}


def _distortion(dataset: LatentDataset, vae: Any, count: int, batch_size: int) -> Summary | None:
    """PSNR of whole decoded images to the pixels that the store keeps; None where it keeps none."""
    if not dataset.manifest.identity.pixels:
        return None
    whole = LatentDataset(dataset.path, columns=(), pixels=True)
    metric, number = psnr.build(), min(count, len(whole))
    for start in range(0, number, batch_size):
        some = [key * len(whole) // number for key in range(start, min(start + batch_size, number))]
        batch = whole.read(some, [0] * len(some), ())
        decoded = whole.decode(batch["indices"], vae).cpu()
        metric.update(PINNED.pair(to_pixels(batch["pixels"]), decoded, alpha=has_alpha(vae)))
    return metric.running.summary()


def nouns(rates: Json) -> tuple[str, str, str]:
    """Words for several and for one of what is coded, and for one of its values."""
    return ("sounds", "a sound", "sample") if rates.get("sample_rate") else ("images", "an image", "pixel")


def in_words(rates: Json) -> str:
    """Lines that the program prints of `record_rates`."""
    bits = {name: found["mean"] for name, found in rates["bits_per_index"].items()}
    several, one, part = nouns(rates)
    what = f"held-out {several}" if rates["held_out"] else f"{several} of the training store"
    prior = f"prior {'' if rates['is_exact'] else 'at most '}{bits['prior']:.3f}"
    image = bits["prior"] * rates["indices"]
    found = "" if rates["psnr"] is None else f", decoded at a PSNR of {rates['psnr']['mean']:.2f} dB"
    lines = [
        f"bits per index of {rates['images']:,} {what}: {prior}, independent codes {bits['position']:.3f} by position, "
        f"{bits['overall']:.3f} overall, {rates['fitted']:.3f} fitted to these {several}, "
        f"uniform {rates['uniform']:.3f}",
        f"that is {image / rates['pixels']:.4f} bits per {part} and {image:,.0f} bits {one} of {rates['pixels']:,} "
        f"{part}s{found}",
    ]
    if (rate := rates.get("sample_rate")) is not None:
        return "\n".join([*lines, f"and {image / rates['pixels'] * rate:,.0f} bits per second"])
    return "\n".join(lines if rates["psnr"] is not None else [*lines, NO_PIXELS])
