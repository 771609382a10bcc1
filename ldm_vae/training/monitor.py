"""Health monitor: statistics of the logits, and plain sentences when the adversary saturates, collapses or runs away,
when a linear code beats the network, or when the network overfits.

The sentences are a function of the lines of metrics.jsonl alone, so a resumed run says what an undisturbed one says.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from ldm_vae.discriminators import Logits, per_head
from ldm_vae.metrics.titles import ValidationMetric
from ldm_vae.run import checkpoint
from ldm_vae.training.adaptive_weight import LARGEST
from ldm_vae.training.adversary import AdversaryConfig

INTERVALS_IN_A_ROW = 3  # of the log, before a state is called one: single intervals of a healthy game look like any
WON = 0.98  # accuracy on both sides; healthy runs of the demo stay below 0.9
LOST = 0.35  # mean accuracy: wrong more often than right
BLIND = 0.015  # mean accuracy within this of a half
JUMP = 20.0  # a gradient norm over the median of those before, of which there are at least so many:
HISTORY = 10
START = 15  # intervals that a discriminator may be blind for: the demo's needs a dozen
WORSE = 0.02  # of the best held-out error (0.17 dB PSNR); neighbouring validations of a settled run differ by under 1 %

METRICS = [name for names in get_args(ValidationMetric) for name in get_args(names)]
FLOORS = {("psnr", "lpips_alex"): ("PSNR", "LPIPS"), ("snr", "mel_distance"): ("SNR", "mel distance")}
PESQ = 4.65  # above the best, 4.644

Line = Mapping[str, Any]


@torch.no_grad()
def logit_statistics(real_logits: Logits, fake_logits: Logits, boundary: float = 0.0) -> dict[str, torch.Tensor]:
    """Share of real and of fake patches that the discriminator gets right, and the margin between the two means; of
    several heads the mean. Above the boundary is real.

    Both shares near 1 and a growing margin: the discriminator has won, and its gradient says nothing more. Both near
    0.5: it has learned nothing yet.
    """
    return {
        "health/real_accuracy": per_head(lambda real: (real > boundary).float().mean(), real_logits),
        "health/fake_accuracy": per_head(lambda fake: (fake < boundary).float().mean(), fake_logits),
        "health/logit_margin": per_head(lambda real, fake: real.mean() - fake.mean(), real_logits, fake_logits),
    }


PLAYED = {"health/real_accuracy", "health/fake_accuracy", "health/logit_margin"}  # a log that was edited may lack one


def diagnose(log: Sequence[Line], config: AdversaryConfig) -> dict[str, str]:
    """Diagnose the adversarial game in the last interval of `log` (lines of metrics.jsonl, oldest first): a name and a
    sentence with the remedy for each problem; empty when all is well or the discriminator does not play yet."""
    played = [line for line in log if line.keys() >= PLAYED]
    averages = [line for line in log if "loss/total" in line]
    if not averages:
        return {}
    found = _gradient_jumps(averages)
    recent = played[-INTERVALS_IN_A_ROW:]
    if len(recent) < INTERVALS_IN_A_ROW or recent[-1] is not averages[-1]:
        return found
    last = recent[-1]
    real, fake, margin = (last[f"health/{name}"] for name in ("real_accuracy", "fake_accuracy", "logit_margin"))
    seen = f"it gets {real:.0%} of the original and {fake:.0%} of the reconstructed patches right, margin {margin:.2g}"
    accuracies = [(line["health/real_accuracy"], line["health/fake_accuracy"]) for line in recent]
    if all(min(pair) > WON for pair in accuracies):
        found["saturated"] = (
            f"the discriminator has won ({seen}): its gradient says little about pictures; lower "
            "discriminator_learning_rate, or set adversary.r1_weight (10) or, on small data, adversary.lecam_weight"
        )
    elif all(abs(sum(pair) / 2 - 0.5) < BLIND for pair in accuracies) and _started(played):
        found["blind"] = (
            f"the discriminator tells nothing apart ({seen}): raise discriminator_learning_rate, give it a start with "
            "adversary.warmup_images, or lower adversary.r1_weight"
        )
    elif all(sum(pair) / 2 < LOST for pair in accuracies):
        found["fooled"] = (
            f"the discriminator is wrong more often than right ({seen}): the autoencoder outruns it; lower "
            "adversary.weight or raise discriminator_learning_rate"
        )
    if config.adaptive and all(_at_ceiling(line, config) for line in recent):
        found["ceiling"] = (
            "the adaptive weight stands at its ceiling: the adversary's gradient has all but vanished at the last "
            "layer; set adversary.r1_weight, or use `adversary.loss: non_saturating`"
        )
    return found


def below_linear(scores: Line, init: str) -> dict[str, str]:
    """A name and a sentence where a validation is below the linear code of the same size in PSNR and in LPIPS, or of
    sounds in SNR and mel distance; init: of the run."""
    named = next((pair for pair in FLOORS if {f"linear_code/{name}" for name in pair} <= scores.keys()), None)
    if named is None:
        return {}
    (ratio, ratio_floor), (distance, distance_floor) = (
        (scores[f"validation/{name}"], scores[f"linear_code/{name}"]) for name in named
    )
    if ratio >= ratio_floor or distance <= distance_floor:
        return {}
    high, low = FLOORS[named]
    sentence = (
        f"the network reconstructs worse than a linear code of its size ({high} {ratio:.2f} against {ratio_floor:.2f} "
        f"dB, {low} {distance:.3f} against {distance_floor:.3f}): train on"
        f"{'' if init == 'linear' else ', or start from that code with `init: linear`'}"
    )
    return {"below_linear": sentence}


def overfitting(log: Sequence[Line], metric: str, run: Path) -> dict[str, str]:
    """A name and a sentence when the last validations in `log` are worse than the best while the objective fell.

    In each of the last INTERVALS_IN_A_ROW validations the error is above the best one's by more than WORSE, no other
    held-out metric is better than there (l1 and LPIPS may trade), and the mean of loss/total (without the adversary)
    since the validation before is below that of the best.

    Args:
        metric: the run's `best_metric`.
        run: its folder, for the command in the sentence.
    """
    validations = [line for line in log if f"validation/{metric}" in line]
    errors = [_errors(line) for line in validations]
    losses = [
        _mean_loss(log, after, line["images"]) for after, line in zip([None, *validations], validations, strict=False)
    ]
    if len(validations) <= INTERVALS_IN_A_ROW:
        return {}
    best = min(range(len(errors)), key=lambda place: errors[place][metric])
    for place in range(len(errors) - INTERVALS_IN_A_ROW, len(errors)):
        worse = errors[place][metric] > (1 + WORSE) * errors[best][metric]
        traded = any(errors[place][name] < errors[best][name] for name in errors[place].keys() & errors[best].keys())
        if not worse or traded or not losses[place] < losses[best]:
            return {}
    at, now = validations[best], validations[-1]
    command = f"`ldm-vae export {shlex.quote(str(run))} OUT --checkpoint best`"
    sentence = (
        f"the network overfits: held-out {metric} was best at {at['images']:,} images "
        f"({at[f'validation/{metric}']:.4g}) and has been worse in the last {INTERVALS_IN_A_ROW} validations (now "
        f"{now[f'validation/{metric}']:.4g}), while the training objective fell from {losses[best]:.3g} to "
        f"{losses[-1]:.3g}: {command} writes checkpoint {checkpoint.name(at['images'])}; train on more images, or for "
        "less long"
    )
    return {"overfitting": sentence}


def _errors(validation: Line) -> dict[str, float]:
    """Held-out metrics as errors, of which a share can be taken: the RMSE for ratios in dB, 1 - SSIM."""
    known = {name: float(validation[f"validation/{name}"]) for name in METRICS if f"validation/{name}" in validation}
    forms = dict.fromkeys(("psnr", "si_sdr", "snr"), lambda value: 10 ** (-value / 20))
    forms |= {"ssim": lambda value: 1 - value, "stoi": lambda value: 1 - value, "pesq": lambda value: PESQ - value}
    return {name: forms.get(name.removeprefix("alpha_"), float)(value) for name, value in known.items()}


def _mean_loss(log: Sequence[Line], after: Line | None, until: int) -> float:
    """The mean of loss/total over the log's intervals between two validations; NaN where there is none."""
    start = -1 if after is None else after["images"]
    losses = [line["loss/total"] for line in log if "loss/total" in line and start < line["images"] <= until]
    return statistics.fmean(losses) if losses else math.nan


def _started(played: Sequence[Line]) -> bool:
    """True once the discriminator has had time to learn: its first intervals are blind in every run."""
    return len(played) > START


def _at_ceiling(line: Line, config: AdversaryConfig) -> bool:
    return bool(line.get("adversary/weight_on_sums", 0.0) > 0.99 * LARGEST * config.weight)


def _gradient_jumps(averages: Sequence[Line]) -> dict[str, str]:
    found = {}
    for side in ("autoencoder", "discriminator"):
        norms = [line[f"gradient_norm/{side}"] for line in averages if f"gradient_norm/{side}" in line]
        before = [norm for norm in norms[:-1] if math.isfinite(norm)]
        if len(before) < HISTORY or f"gradient_norm/{side}" not in averages[-1]:
            continue
        usual = statistics.median(before)
        if usual > 0 and norms[-1] > max(JUMP * usual, *before):  # a vanishing norm flickers by more
            found[f"jump_{side}"] = (
                f"the gradient norm of the {side} jumped to {norms[-1]:.2g}, its median is {usual:.2g}: set "
                "max_grad_norm near that median's tenfold, or lower the learning rate"
            )
    return found
