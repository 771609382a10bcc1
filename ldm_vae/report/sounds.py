"""Sounds on the page: what each VAE made of them, to listen to and as spectrograms, and how they were measured.

Players hold FLAC of 16 bits, as loud as the files are: what is above full scale is clipped there, and said.

Legend: C channels, S samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ldm_vae.core.errors import UsageError
from ldm_vae.data.sounds import NEEDED
from ldm_vae.metrics.result import how_decoded, in_words
from ldm_vae.perceptual.spectrogram import DECIBELS, mel
from ldm_vae.report import images
from ldm_vae.report.charts import compact, linear_axis
from ldm_vae.report.gallery import chosen_metrics

Json = dict[str, Any]

MOST = 2**24  # samples of all players together: as FLAC and in base64 at most 45 MB, of music half of that
WIDTH, LEFT, TOP, HEIGHT, STRIP = 400, 44, 8, 150, 10  # of a spectrogram, in the units of charts
TICKS = (100, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


def section(home: Path, pictures: Sequence[Json], results: Sequence[Json]) -> Json | None:
    """Everything the template needs of the sounds among `pictures` (pictures.json), in order; None without any."""
    names, folder = [result["vae"]["name"] for result in results], home / "pictures"
    pictures = [picture for picture in pictures if "sound" in picture["vaes"][0]]
    if not pictures:
        return None
    room = MOST // sum(1 + len(picture["vaes"]) for picture in pictures)
    cards = [
        {
            "key": picture["key"],
            "kind": picture["kind"],
            "original": _heard(folder, f"{picture['name']}.original", None, room, f"original of {picture['key']}"),
            "vaes": [
                {
                    "name": name,
                    "metrics": chosen_metrics(vae["metrics"]),
                    **_heard(
                        folder, vae["sound"].removesuffix(".wav"), vae["latent"], room, f"{picture['key']} by {name}"
                    ),
                }
                for name, vae in zip(names, picture["vaes"], strict=True)
            ],
        }
        for picture in pictures
    ]
    heard = [one for card in cards for one in (card["original"], *card["vaes"])]
    return {
        "cards": cards,
        "ranked": any(card["kind"] != "shown" for card in cards),
        "cut": any(one["cut"] for one in heard),
        "decibels": f"{DECIBELS:g}",
        "stops": ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in images.STOPS),
    }


def _heard(folder: Path, name: str, latent: str | None, room: int, label: str) -> Json:
    """A player, of at most `room` samples, its spectrogram with the latent below it, and samples that are clipped."""
    try:
        import soundfile
    except ImportError as error:
        raise UsageError(NEEDED) from error
    samples, rate = soundfile.read(images.inside(folder, f"{name}.wav"), dtype="float32", always_2d=True)
    played, buffer = samples[: room // samples.shape[1]], io.BytesIO()
    soundfile.write(buffer, played, rate, format="FLAC", subtype="PCM_16")
    levels = images.heat_map(images.read_map(images.inside(folder, f"{name}.png")), 1.0)
    strip = None if latent is None else images.embed(images.inside(folder, latent))
    return {
        "player": f"data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "picture": _spectrogram(levels, strip, len(samples) / rate, rate, label),
        "clipped": int((np.abs(played) > 1).any(axis=1).sum()),
        "cut": len(played) < len(samples),
        "label": label,
    }


def _spectrogram(levels: str, latent: str | None, seconds: float, rate: int, label: str) -> Markup:
    across, top = WIDTH - LEFT, mel(rate / 2)
    parts = [_image(levels, TOP, HEIGHT, "pixels")]
    parts += [] if latent is None else [_image(latent, TOP + HEIGHT + 2, STRIP, "pixels")]
    for hertz in (tick for tick in TICKS if tick < 0.9 * rate / 2):
        y = TOP + HEIGHT * (1 - mel(hertz) / top)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{compact(hertz)}</text>')
        parts.append(f'<line class="grid" x1="{LEFT - 4}" x2="{LEFT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    foot = TOP + HEIGHT + 2 + STRIP + 16
    for second in linear_axis(0.0, seconds, tight=True).ticks:
        x = LEFT + across * second / seconds
        anchor = "start" if x < LEFT + 20 else "end" if x > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{foot}" text-anchor="{anchor}">{compact(second)}</text>')
    parts.append(f'<text class="axis" x="0" y="{foot}">Hz, s</text>')
    spoken = escape(f"spectrogram of {label}")
    return Markup(  # every other word in it is a number
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {foot + 6}" role="img" aria-label="{spoken}">'
        f"{''.join(parts)}</svg></div>"
    )


def _image(uri: str, top: int, height: int, name: str) -> str:
    return (
        f'<image class="{name}" href="{uri}" x="{LEFT}" y="{top}" width="{WIDTH - LEFT}" height="{height}" '
        'preserveAspectRatio="none"/>'
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def rate(result: Json) -> str:
    """Bits per second of the codes of sounds; empty of all others."""
    spent = result.get("codes", {}).get("bits_per_second")
    return "" if spent is None else f"{spent / 1000:,.4g} kbit/s"


def of_kl(bits: float, data: Json) -> str:
    """A KL in bits per pixel, of sounds, where it is bits per sample, in kbit per second."""
    if "sounds" not in data:
        return f"{bits:.3g} bits per pixel"
    return f"{bits * data['sounds']['sample_rate'] / 1000:.3g} kbit per second"


def protocol(used: Json, data: Json, decoded: str, left_out: str) -> list[str]:
    """The protocol in sentences, as `tables.protocol` has it of images."""
    return [
        f"Protocol “{used['name']}”, version {used['version']}.",
        f"{data['images']:,} sounds{in_words(data)} of {data['source']}{left_out}; each counted exactly once."
        f"{how_decoded(data)}",
        f"Decoded from {decoded}; samples are compared as they are decoded, neither clamped nor rounded, each sound as "
        "far as it goes.",
        "A sound’s value is the mean over its channels; decibels lie between −100 and 100.",
        "Intervals: 95 % of the mean over sounds (Student’s t); they are taken as independent, which excerpts of one "
        "file are not.",
    ]
