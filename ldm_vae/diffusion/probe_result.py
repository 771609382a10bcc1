"""Results of eval.diffusability: means and intervals over seeds, the sentences, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ldm_vae.metrics.running import Running

Json = dict[str, Any]


def summarised(entry: Json) -> Json:
    """Add means and intervals over seeds (Student's t)."""
    for name, offset in (("fd_samples", 0.0), ("fd_gap", entry["fd_reconstructions"])):
        running = Running()
        running.update(torch.tensor([run["fd_samples"] - offset for run in entry["runs"]], dtype=torch.float64))
        entry["metrics"][name] = running.summary().to_json()
    return entry


def verdicts(found: Sequence[Json]) -> list[str]:
    """A sentence for each two VAEs, the one with the smaller gap first."""
    ordered = sorted(found, key=lambda entry: float(entry["metrics"]["fd_gap"]["mean"]))
    return [verdict(better, other) for place, better in enumerate(ordered) for other in ordered[place + 1 :]]


def verdict(better: Json, other: Json) -> str:
    """Sentence on two VAEs: a difference is shown if the intervals of their gaps do not overlap."""
    names = [entry["vae"]["name"] for entry in (better, other)]
    gaps = [entry["metrics"]["fd_gap"] for entry in (better, other)]
    if any(gap["ci95"] is None for gap in gaps):
        return f"{names[0]} and {names[1]}: no difference shown, one seed has no interval."
    said = [f"{gap['mean']:.1f} ({gap['ci95'][0]:.1f} to {gap['ci95'][1]:.1f})" for gap in gaps]
    if gaps[0]["ci95"][1] < gaps[1]["ci95"][0]:
        return (
            f"A diffusion model learns the latents of {names[0]} better than those of {names[1]}: "
            f"gap {said[0]} against {said[1]}."
        )
    return f"{names[0]} and {names[1]}: no difference shown, gap {said[0]} and {said[1]}."


def markdown(results: Json) -> str:
    """Table and sentences."""
    one_shape = len({tuple(entry["latent_shape"]) for entry in results["vaes"]}) == 1
    heads = ["VAE", "gap", "samples", "reconstructions", "high-frequency share", "equivariance error", "latent",
             "tokens", "GFLOP", *(["loss"] if one_shape else [])]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for entry in results["vaes"]:
        metrics, network = entry["metrics"], entry["network"]
        cells = [
            entry["vae"]["name"], plus_minus(metrics["fd_gap"], ".1f"), plus_minus(metrics["fd_samples"], ".1f"),
            f"{entry['fd_reconstructions']:.1f}", plus_minus(metrics["high_frequency_share"], ".3f"),
            plus_minus(metrics["equivariance"], ".3f"), "x".join(map(str, entry["latent_shape"])),
            str(network["tokens"]), f"{network['gflop_per_image']:.3g}",
        ]  # fmt: skip
        if one_shape:  # a loss compares within one latent shape only
            cells.append(f"{sum(run['loss'] for run in entry['runs']) / len(entry['runs']):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    protocol = results["protocol"]
    lines += ["", *results["verdicts"], ""]
    lines.append(
        f"Gap: {protocol['metric']} to {protocol['samples']:,} originals of as many decoded samples, minus that of the "
        f"VAE's reconstructions; mean and half of the 95 % interval over {protocol['seeds']} seeds. "
        f"{protocol['train_images']:,} images of {protocol['resolution']} px each."
    )
    return "\n".join(lines) + "\n"


def plus_minus(summary: Json, form: str) -> str:
    if summary["mean"] is None:
        return "-"
    half = f" ± {(summary['ci95'][1] - summary['ci95'][0]) / 2:{form}}" if summary["ci95"] else ""
    return f"{summary['mean']:{form}}{half}"
