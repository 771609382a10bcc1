"""The page's section on the latent space: what eval.latent_space has left, as its template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.latent_space import summary
from ldm_vae.metrics.result import in_words, noun
from ldm_vae.metrics.titles import amount
from ldm_vae.report import images
from ldm_vae.report.charts import Series, bar_chart, ends, extremes, line_chart
from ldm_vae.report.tables import latent_spectrum

Json = dict[str, Any]

FRAME = 96  # CSS pixels of a picture in a strip, where there is room
WAYS = {"linear": "Along the line", "spherical": "Along the arc"}
PRIORS = {
    "normal": "Drawn from N(0, I)",
    "field": "Drawn from a Gaussian field",
    "mixture": "Drawn from a Gaussian mixture",
}


def section(home: Path, found: Json | None) -> Json | None:
    """DIR/latent_space.json (`found`) and its pictures; None where there is none."""
    if found is None:
        return None
    channels = found["channels"]
    kl = channels["kl_nats_per_image"]
    pictures, unit = found["pictures"], summary.in_its_words(found, "nats per image")
    return {
        "name": found["vae"]["name"],
        "data": found["data"],
        "measured": f"{noun(found['data'])}{in_words(found['data']) if 'sounds' in found['data'] else ''}",
        "rows": summary.rows(found),
        "sentences": [
            summary.in_its_words(found, sentence)
            for sentence in (summary.about_information(found), summary.about_likelihood(found))
            if sentence
        ],
        "about_channels": summary.about_channels(found),
        "codes": _codes(found.get("codes")),
        "about_codes": summary.about_codes(found),
        "kl": bar_chart(kl, label=f"KL per latent channel in {unit}", y=unit) if kl else None,
        "extremes": extremes(kl, "nats") if kl else "",
        "spectrum": latent_spectrum(found["spectrum"]["latents"]),
        "correlation": _correlation(channels["correlation"]) if len(channels["mean"]) > 1 else None,
        "heads": summary.CHANNEL_HEADS,
        "channels": [summary.channel_rows(found)[channel] for channel in ends(kl or channels["std"])],
        "count": len(channels["mean"]),
        "interpolations": _pairs(home, [entry for entry in pictures if entry["kind"] == "interpolation"]),
        "traversals": [
            _strip(home, entry, _channel_name(entry["channel"], kl))
            for entry in pictures
            if entry["kind"] == "traversal"
        ],
        "traversed": next((entry["keys"][0] for entry in pictures if entry["kind"] == "traversal"), ""),
        "samples": [
            {"title": PRIORS[entry["prior"]], "text": _about(entry["prior"], found)}
            | _strip(home, entry, f"{entry['frames']} draws, decoded", columns=8)
            for entry in pictures
            if entry["kind"] == "samples"
        ],
        "command": found.get("settings", {}).get("command"),
    }


def _about(prior: str, found: Json) -> str:
    if prior == "normal":
        return summary.about_normal(found)
    if prior == "field":
        return "With the latents’ measured mean, deviation and spectrum in each channel: texture, but no objects."
    made = found["mixture"]
    return (
        f"{made['components']} Gaussians, fitted to whole latents in their {made['principal_components']} largest "
        f"principal components ({100 * made['explained_variance']:.0f} % of the variance); the rest is independent "
        "noise."
    )


def _channel_name(channel: int, kl: Sequence[float] | None) -> str:
    carries = "" if kl is None else f", KL {amount(kl[channel])} nats per image"
    return f"Channel {channel}{carries}: from −3 deviations (left) to +3 (right)"


def _pairs(home: Path, entries: Sequence[Json]) -> list[Json]:
    """Linear and spherical strips of each pair, and the two images' keys."""
    return [
        {
            "ends": first["keys"],
            "strips": [
                _strip(home, entry, f"{WAYS[entry['way']]}, {entry['frames']} even steps") for entry in (first, second)
            ],
        }
        for first, second in zip(entries[::2], entries[1::2], strict=True)
    ]


def _strip(home: Path, entry: Json, caption: str, columns: int | None = None) -> Json:
    """One row of frames, or several of so many columns: its picture and the width to show it at."""
    path = images.inside(home, entry["file"])
    side = images.read_pixels(path).shape[1] // (columns or entry["frames"])
    return {
        "uri": images.embed(path),
        "caption": caption,
        "width": (columns or entry["frames"]) * max(FRAME, min(side, 2 * FRAME)),
        "pixelated": side < FRAME,
    }


def _codes(books: Sequence[Json] | None) -> Any:
    """Chart of the share of positions that each used code has, the most frequent first, a line for each codebook; None
    without codebooks."""
    if not books:
        return None
    lines = [
        Series(f"codebook {number}", [(rank + 1.0, uses / book["count"]) for rank, uses in enumerate(book["uses"])])
        for number, book in enumerate(books)
    ]
    most = max(book["codes"] for book in books)
    x, y = "rank of the code, the most frequent first", "share of positions"
    return line_chart(lines, label="use of each code", x=x, y=y, log=True, x_range=(1.0, float(most)))


def _correlation(matrix: Sequence[Sequence[float]]) -> Json:
    """The correlation of channels as a picture with one pixel for each pair, the number of the last channel, and the
    colours of -1 and 1."""
    colours = (f"rgb({red} {green} {blue})" for red, green, blue in (images.NEGATIVE, images.POSITIVE))
    return {"uri": images.signed_map(np.asarray(matrix)), "last": len(matrix) - 1, "ends": list(colours)}
