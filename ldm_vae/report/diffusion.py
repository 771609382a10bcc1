"""Two sections of the page: a diffusion run (what train.diffusion leaves) and the probe of eval.diffusability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.metrics.titles import TITLES
from ldm_vae.report import images, sample_grids

Json = dict[str, Any]

SETS = {  # of images that were compared: heading and meaning
    "samples": ("samples", "of the diffusion model, decoded"),
    "field": ("Gaussian fields", "decoded; with the mean, deviation and spectrum of the latents"),
    "noise": ("noise", "decoded; N(0, I) at the latents' scale, what the sampler starts from"),
}
SHOWN = {  # pictures of the probe: caption
    "reconstructions": "reconstructions of the originals",
    "samples": "samples of the diffusion model, decoded",
}


def run(folder: Path, found: Json | None) -> Json | None:
    """RUN/samples and RUN/report/diffusion.json (`found`); None where there is no such run."""
    shown = None if found is None else sample_grids.shown(folder, found)
    if found is None or shown is None:
        return None
    return shown | {
        "sampling": sampling(found["sampling"]),
        "distances": [distances(found[name]) for name in ("distances", "cmmd") if found.get(name)],
    }


def sampling(used: Json) -> str:
    """The sampler's settings in words."""
    guidance = "no guidance" if used["guidance"] == 1 else f"guidance {used['guidance']:g}"
    return f"{used['method'].capitalize()}, {used['steps']} steps, {guidance}"


def distances(found: Json) -> Json:
    """Heading and rows of a table of distances, the nearest first."""
    rows = [{"name": SETS[name][0], "meaning": SETS[name][1], "value": found[name]} for name in SETS]
    rows.sort(key=lambda row: float(row["value"]))
    title, decimals = (TITLES["cmmd"], 3) if found["metric"] == "cmmd" else (TITLES["fd_efflite0"], 1)
    return {
        "heading": title.heading,
        "meaning": title.meaning,
        "n": f"{found['n']:,}",
        "rows": [row | {"value": f"{row['value']:.{decimals}f}"} for row in rows],
    }


def probe(home: Path, found: Json | None) -> Json | None:
    """DIR/diffusability.json (`found`) and its pictures; None where no probe was run."""
    if found is None:
        return None
    vaes = []
    for entry in found["vaes"]:
        measured = entry["metrics"]
        vaes.append(
            {
                "name": entry["vae"]["name"],
                "gap": _interval(measured["fd_gap"], ".1f"),
                "cells": [
                    _interval(measured["fd_samples"], ".1f"),
                    _cell(f"{entry['fd_reconstructions']:.1f}"),
                    _interval(measured.get("high_frequency_share"), ".3f"),
                    _interval(measured.get("equivariance"), ".3f"),
                    _cell(" × ".join(map(str, entry["latent_shape"]))),
                    _cell(f"{entry['network']['gflop_per_image']:.3g}"),
                ],
                "pictures": [
                    {"uri": images.embed(path), "caption": caption}
                    for kind, caption in SHOWN.items()
                    if (path := images.inside(home, entry["pictures"][kind])).is_file()
                ],
            }
        )
    originals = images.inside(home, "pictures/originals.png")
    return {
        "verdicts": found["verdicts"],
        "vaes": vaes,
        "protocol": found["protocol"],
        "originals": images.embed(originals) if originals.is_file() else None,
    }


def _interval(summary: Json | None, form: str) -> Json:
    if summary is None or summary["mean"] is None:
        return _cell("-")
    ends = summary["ci95"]
    interval = f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else ""
    return _cell(f"{summary['mean']:{form}}", interval)


def _cell(value: str, interval: str = "") -> Json:
    return {"value": value, "interval": interval}
