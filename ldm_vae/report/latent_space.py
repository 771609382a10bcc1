"""The page's section on the latent space: what eval.latent_space has left, as its template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ldm_vae.latent_space import summary
from ldm_vae.report import images
from ldm_vae.report.charts import Series, bar_chart, line_chart

Json = dict[str, Any]

FRAME = 96  # CSS pixels of a picture in a strip, where there is room
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
    pictures = found["pictures"]
    return {
        "name": found["vae"]["name"],
        "data": found["data"],
        "rows": summary.rows(found),
        "sentences": list(filter(None, (summary.about_information(found), summary.about_likelihood(found)))),
        "about_channels": summary.about_channels(found),
        "kl": bar_chart(kl, label="KL per latent channel in nats per image") if kl else None,
        "spectrum": _spectrum(found["spectrum"]["latents"]),
        "correlation": _correlation(channels["correlation"]) if len(channels["mean"]) > 1 else None,
        "heads": summary.CHANNEL_HEADS,
        "channels": summary.channel_rows(found),
        "interpolations": _pairs(home, [entry for entry in pictures if entry["kind"] == "interpolation"]),
        "traversals": [
            _strip(home, entry, _channel_name(entry["channel"], kl))
            for entry in pictures
            if entry["kind"] == "traversal"
        ],
        "traversed": next((entry["keys"][0] for entry in pictures if entry["kind"] == "traversal"), ""),
        "samples": [
            {"title": PRIORS[entry["prior"]], "text": _about(entry["prior"], found)}
            | _strip(home, entry, PRIORS[entry["prior"]].lower(), columns=8)
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
    return f"channel {channel}" if kl is None else f"channel {channel}, {kl[channel]:,.2f} nats"


def _pairs(home: Path, entries: Sequence[Json]) -> list[Json]:
    """Linear and spherical strips of each pair, and the two images' keys."""
    return [
        {
            "ends": first["keys"],
            "strips": [_strip(home, entry, entry["way"]) for entry in (first, second)],
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


def _spectrum(power: Sequence[float]) -> Markup | None:
    """Chart of the power spectrum; None for a latent of one position."""
    if len(power) < 3:
        return None
    last = len(power) - 1
    points = [(0.5 * place / last, value) for place, value in enumerate(power) if place]
    average = sum(value for _, value in points) / len(points)
    white = [(x, average) for x, _ in points]
    series = [Series("latents", points), Series("white noise", white, faint=True)]
    return line_chart(series, label="power spectrum of the latents", log=True)


def _correlation(matrix: Sequence[Sequence[float]]) -> Markup:
    """The correlation of channels as a square of cells: opacity is strength, colour is sign."""
    count = len(matrix)
    side = 100 / count
    cells = [
        f'<rect class="{"s0" if value >= 0 else "s1"}" x="{column * side:.2f}" y="{row * side:.2f}" '
        f'width="{side * 0.96:.2f}" height="{side * 0.96:.2f}" fill-opacity="{min(1.0, abs(value)):.3f}">'
        f"<title>channels {row} and {column}: {value:+.2f}</title></rect>"
        for row, line in enumerate(matrix)
        for column, value in enumerate(line)
    ]
    return Markup(
        '<div class="correlation"><svg viewBox="0 0 100 100" role="img" aria-label="correlation of latent channels">'
        f"{''.join(cells)}</svg></div>"
    )
