"""Section of the page on a prior over codes: what train.prior leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.prior.rates import nouns
from ldm_vae.report import images, sample_grids

Json = dict[str, Any]

INDEPENDENT = {  # by name: heading and meaning
    "position": ("independent, by position", "each code by its frequency at its position in training codes"),
    "overall": ("independent, overall", "each code by its frequency anywhere in training codes"),
}
FIXED = (
    ("fitted", "independent, fitted", "the frequencies of these very codes: the fewest bits that one table can take"),
    ("uniform", "uniform", "every code alike"),
)


def run(folder: Path, found: Json | None) -> Json | None:
    """RUN/samples and RUN/report/prior.json (`found`); None where there is no such run."""
    shown = None if found is None else sample_grids.shown(folder, found)
    if found is None or shown is None:
        return None
    independent = images.inside(folder / "samples", "independent.png")
    return shown | {
        "sampling": sampling(found["sampling"]),
        "rates": None if found.get("rates") is None else rates(found["rates"]),
        "independent": images.embed(independent) if independent.is_file() else None,
    }


def sampling(used: Json) -> str:
    """The sampler's settings in words."""
    parts = [f"temperature {used['temperature']:g}"]
    parts += [f"top-k {used['top_k']}"] if used["top_k"] is not None else []
    parts += [f"top-p {used['top_p']:g}"] if used["top_p"] is not None else []
    return ", ".join(parts).capitalize()


def rates(found: Json) -> Json:
    """Rows of a table of rates, and a sentence on what they were measured on."""
    exact = "its exact likelihood" if found["is_exact"] else "an upper bound, of indices unmasked in a random order"
    named = {"prior": ("prior", exact), **INDEPENDENT}
    rows = [_row(found, *named[name], found["bits_per_index"][name]) for name in named]
    for name, heading, meaning in FIXED:
        rows.append(_row(found, heading, meaning, {"mean": found[name], "ci95": None}))
    several, one, part = nouns(found)
    whose = f"held-out {several}" if found["held_out"] else f"{several} of the training store"
    psnr = found["psnr"]
    return {
        "measured": f"{found['images']:,} {whose}, {found['indices']:,} indices for {found['pixels']:,} {part}s each",
        "one": one.split()[-1],
        "part": part,
        "rows": rows,
        "psnr": None if psnr is None else f"{psnr['mean']:.2f}",
    }


def _row(found: Json, name: str, meaning: str, bits: Json) -> Json:
    image = bits["mean"] * found["indices"]
    return {
        "name": name,
        "meaning": meaning,
        "index": f"{bits['mean']:.3f}",
        "interval": f"{bits['ci95'][0]:.3f} to {bits['ci95'][1]:.3f}" if bits["ci95"] else "",
        "pixel": f"{image / found['pixels']:.4f}",
        "image": f"{image:,.0f}",
    }
