"""Drift of a fine-tuned VAE from its base, for a diffusion model that was trained on the base's latents.

Such a model hands base latents to the tuned decoder (text to image), and gets tuned latents from the tuned encoder
(image to image). So both are measured: the latents against each other, and all four ways of encoding and decoding
against the images.

Legend: B batch, c latent channels, P latent positions: h w of images, t h w of clips, n of sounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.geometry import downsampling_factor, latent_channels
from ldm_vae.autoencoder.lengths import Lengths, lengths_of
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.data.transforms import to_values
from ldm_vae.metrics.batches import ImageBatch
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.running import Summary
from ldm_vae.metrics.select import build_metrics

WAYS = {
    "base -> base": "what the base does",
    "base -> tuned": "base latents, tuned decoder: text to image with a diffusion model of the base",
    "tuned -> base": "tuned latents, base decoder: how foreign tuned latents are to a model of the base",
    "tuned -> tuned": "what the tuned one does",
}
RATIOS = ("psnr", "snr")  # in dB of the error, of images and of sounds
# of the base's standard deviation: 0.1 is 20 dB below the latents themselves
SAME_RMS, CLOSE_RMS = 0.1, 0.3
SAME_LOSS, CLOSE_LOSS = 0.5, 1.5  # dB below the base's own reconstruction


@dataclass(frozen=True)
class Drift:
    """Drift of a tuned VAE. rms, shift [c] and scale [c] are in units of the base's standard deviation (scale: ratio of
    the two); cosine is the mean over images, of latents centred by the base's channel means; metrics by way and
    name."""

    same_encoder: bool
    same_normalisation: bool
    images: int
    cosine: float
    rms: float
    shift: list[float]
    scale: list[float]
    metrics: dict[str, dict[str, Summary]]

    def psnr(self, way: str) -> float:
        """Mean PSNR in dB of one way, of sounds the SNR: between two ways both differ by what the errors do."""
        value = next(self.metrics[way][name].mean for name in RATIOS if name in self.metrics[way])
        assert value is not None
        return value

    @property
    def verdict(self) -> str:
        """Verdict in one sentence: whether a diffusion model of the base can go on with the tuned VAE."""
        own, cross = self.psnr("base -> base"), self.psnr("base -> tuned")
        decoder = f"base latents decode at {cross:.2f} dB (base: {own:.2f} dB)"
        if self.same_encoder:
            text = f"compatible: the encoder is unchanged, so latents and stores stay valid; {decoder}"
        elif self.rms <= SAME_RMS and cross >= own - SAME_LOSS:
            text = f"compatible: latents moved by {self.rms:.3f} of their standard deviation; {decoder}"
        elif self.rms <= CLOSE_RMS and cross >= own - CLOSE_LOSS:
            text = (
                f"close: latents moved by {self.rms:.3f} of their standard deviation; {decoder}; "
                "a short fine-tune of the diffusion model would help, and stores must be encoded again"
            )
        else:
            text = (
                f"not compatible: latents moved by {self.rms:.3f} of their standard deviation; {decoder}; "
                "a diffusion model of the base must be trained on the new latents"
            )
        if not self.same_normalisation:
            return (
                "not compatible as it is: the configs name different normalisations, and a frozen diffusion model "
                f"needs the base's (`ldm-vae export --normalisation_from BASE` writes it); with that, {text}"
            )
        return text

    def to_json(self) -> dict[str, Any]:
        """All results as JSON, for programs."""
        metrics = {way: {name: one.to_json() for name, one in found.items()} for way, found in self.metrics.items()}
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "metrics"}
        return {"verdict": self.verdict, **plain, "metrics": metrics}

    def lines(self) -> list[str]:
        """Lines for the terminal and the card."""
        rows = [
            f"encoder: {'identical' if self.same_encoder else 'changed'}; {self.images:,} "
            f"{'sounds' if 'snr' in self.metrics['base -> base'] else 'images'}",
            f"latents: cosine {self.cosine:.5f}, RMS difference {self.rms:.4f} of the base's standard deviation",
            f"shift per channel: {_numbers(self.shift)}",
            f"scale per channel: {_numbers(self.scale)}",
        ]
        for way, meaning in WAYS.items():
            measured = {name: one.mean for name, one in self.metrics[way].items() if one.mean is not None}
            shown = ", ".join(f"{name} {mean:.4g}" for name, mean in measured.items())
            rows.append(f"{way}: {shown} ({meaning})")
        return [*rows, f"verdict: {self.verdict}"]


def _law(lengths: Lengths) -> str:
    latent = Lengths(lengths.latent_first, lengths.latent_step, 0, 0)
    return f"{latent.law} latent frames of {lengths.law}"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:+.3f}" for value in values)


@torch.no_grad()
def measure_drift(
    base: Any,
    tuned: Any,
    batches: Iterable[ImageBatch],
    *,
    resolution: int,
    lpips: bool = True,
    total: int | None = None,
    normalisation: Normalisation | None = None,
    sample_rate: int | None = None,
) -> Drift:
    """Compare two VAEs on one device over `batches` of images, clips or sounds.

    Args:
        resolution: of sounds the samples of an excerpt, whose rate is `sample_rate`.
        lpips: measure LPIPS too, of sounds the mel distance.
        normalisation: the one that `tuned` is about to be written with; by default its config's.

    Raises:
        UsageError: their latents have different shapes.
        WorkError: there was no image.
    """
    shapes = [(latent_channels(vae), downsampling_factor(vae)) for vae in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"BASE has {shapes[0][0]} channels at f = {shapes[0][1]}, TUNED {shapes[1][0]} at {shapes[1][1]}"
        )
    in_time = [] if sample_rate is not None else [lengths_of(vae) for vae in (base, tuned)]
    if len({*in_time}) > 1:
        raise UsageError(f"BASE makes {_law(in_time[0])}, TUNED {_law(in_time[1])}")
    names = ("psnr", "lpips_alex") if sample_rate is None else ("snr", "mel_distance")
    metrics = {
        way: build_metrics(names if lpips else names[:1], base.device, resolution, sample_rate=sample_rate)
        for way in WAYS
    }
    means: dict[str, list[torch.Tensor]] = {"base": [], "tuned": []}
    vaes = {"base": base, "tuned": tuned}
    for batch in Progress(batches, desc="drift", unit="batch", leave=False, total=total):
        pixels = to_values(batch.pixels.to(base.device))
        z = {name: finite.encode(vae, pixels).mean for name, vae in vaes.items()}
        for name, value in z.items():
            # on the CPU and in fp64: the statistics below are over all images at once
            means[name].append(value.flatten(2).double().cpu())
        for way, measured in metrics.items():
            encoder, decoder = way.split(" -> ")
            decoded = finite.decode(vaes[decoder], z[encoder])
            pair = PINNED.pair(pixels, decoded, alpha=batch.alpha, lengths=batch.lengths)
            for metric in measured:
                metric.update(pair)
    if not means["base"]:
        raise WorkError("drift: there was no usable image")
    # [c, all positions]: images among clips have fewer of them
    before, after = (torch.cat([one for part in means[name] for one in part], dim=1) for name in ("base", "tuned"))
    centre, std = before.mean(1, keepdim=True), before.std(1, keepdim=True)
    # in the base's deviations, channel by channel: what a diffusion model of the base sees as 1
    apart = (after - before) / std
    cosine = torch.cat([
        torch.cosine_similarity((one - centre).flatten(1), (other - centre).flatten(1))
        for one, other in zip(means["base"], means["tuned"], strict=True)
    ])  # fmt: skip
    return Drift(
        same_encoder=encoder_fingerprint(base) == encoder_fingerprint(tuned),
        same_normalisation=own_normalisation(base, "the base")
        == (normalisation or own_normalisation(tuned, "the VAE")),
        images=len(cosine),
        cosine=float(cosine.mean()),
        rms=float(apart.square().mean().sqrt()),
        shift=apart.mean(1).tolist(),
        scale=(after.std(1) / std.flatten()).tolist(),
        metrics={way: {metric.name: metric.compute() for metric in measured} for way, measured in metrics.items()},
    )
