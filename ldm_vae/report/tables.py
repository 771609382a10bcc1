"""Numbers for the page, as the template writes them: headline figures, metrics, latents, protocol."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ldm_vae import metrics
from ldm_vae.core import intervals
from ldm_vae.core.programs import words_of
from ldm_vae.data.transforms import decoding_of
from ldm_vae.latent_space.summary import about_codes
from ldm_vae.metrics.result import LINEAR, how_decoded, in_words, noun
from ldm_vae.metrics.titles import TITLES, amount, heading, measured, number, title
from ldm_vae.report import sounds
from ldm_vae.report.charts import Series, bar_chart, ends, extremes, line_chart
from ldm_vae.report.contents import Contents
from ldm_vae.report.gallery import of_curves

Json = dict[str, Any]

PUBLISHED = Path(metrics.__file__).parent / "published.json"

UNKNOWN_RATE = 10.0  # frames a second of videos whose rates may differ

POWER = "power; white noise of variance 1 has 1"

LINEAR_MEANING = "Principal components of the measured patches, as many as latent channels: what least squares knows."

ROUNDING = {
    "round": "rounded to 8 bits",
    "truncate": "truncated to 8 bits",
    "truncate_half_up": "made 8-bit by floor(127.5 x + 128)",
}


def headline(contents: Contents) -> list[Json]:
    """Four figures at most. One VAE: three metrics and how much smaller its latent is. Several: PSNR of each."""
    if len(contents.results) > 1:
        return [found for result in contents.results[:4] if (found := _of_several(result))]
    figures = []
    for result in contents.results:
        for name in ("psnr", "lpips_alex", "ssim", "si_sdr", "mel_distance", "log_spectral_distance"):
            summary = result["metrics"].get(name)
            if summary and summary["mean"] is not None:
                title, interval = TITLES[name], summary["ci95"]
                detail = f"95 %: {number(name, interval[0])} to {number(name, interval[1])}" if interval else ""
                value = number(name, summary["mean"])
                figures.append({"label": title.heading, "value": value, "unit": title.unit, "detail": detail})
        ratio, shape = _compression(result)
        label = "Fewer numbers" if ratio >= 1 else "More numbers"
        figures.append({"label": label, "value": f"{max(ratio, 1 / ratio):.3g}", "unit": "×", "detail": shape})
    return figures


def _of_several(result: Json) -> Json | None:
    first, perceptual = ("si_sdr", "mel_distance") if "sounds" in result["data"] else ("psnr", "lpips_alex")
    known = {name: one["mean"] for name, one in result["metrics"].items() if one["mean"] is not None}
    if first not in known:
        return None
    parts = [f"{TITLES[perceptual].heading} {number(perceptual, known[perceptual])}"] if perceptual in known else []
    ratio = _compression(result)[0]
    parts.append(sounds.rate(result) or f"{max(ratio, 1 / ratio):.3g} × {'fewer' if ratio >= 1 else 'more'} numbers")
    unit = f"dB {TITLES[first].heading}"
    return {
        "label": result["vae"]["name"], "value": number(first, known[first]), "unit": unit, "detail": ", ".join(parts)
    }  # fmt: skip


def _compression(result: Json) -> tuple[float, str]:
    """Compression: the numbers of an image that one number of its latent stands for, and both shapes."""
    vae, data = result["vae"], result["data"]
    factor, channels, colours = vae["downsampling_factor"], vae["latent_channels"], vae.get("image_channels", 3)
    if "sounds" in data:
        samples = data["sounds"]["samples"]
        before, after = [samples, colours], [samples // factor, channels]
        return math.prod(before) / math.prod(after), f"{_shape(before)} → {_shape(after)}"
    before, after = [*_square(data["resolution"]), colours], [*_square(data["resolution"] // factor), channels]
    if "clips" in data:
        before, after = [data["clips"]["frames"], *before], [vae["latent_frames"], *after]
    return math.prod(before) / math.prod(after), f"{_shape(before)} → {_shape(after)}"


def _square(side: int) -> tuple[int, int]:
    return side, side


def _shape(sides: Sequence[int]) -> str:
    return " × ".join(map(str, sides))


def subtitle(contents: Contents) -> str:
    """One line on what was trained and measured."""
    parts = []
    if contents.results:
        vae, data = contents.results[0]["vae"], contents.results[0]["data"]
        if len(contents.results) == 1:
            parts += [vae["class"]] if "class" in vae else []
            parts.append(f"{vae['parameters'] / 1e6:.2f} M parameters, f = {vae['downsampling_factor']}")
            parts += [f"normalisation {vae['normalisation']}"] if "normalisation" in vae else []
        else:
            parts.append(f"{len(contents.results)} autoencoders")
        of = f"{data['clips']['frames']} frames of " if "clips" in data else ""
        size = in_words(data) if "sounds" in data else f" of {of}{data['resolution']} px"
        if len(contents.results) == 1 and (rate := sounds.rate(contents.results[0])):
            parts.append(rate)
        parts.append(f"{data['images']:,} {noun(data)}{size} measured")
    if contents.log:
        seen = noun(contents.results[0]["data"] if contents.results else {}).replace("clips", "images")
        parts.insert(1, f"trained on {contents.log[-1]['images']:,} {seen}")
    return " · ".join(parts)


def metric_rows(results: Sequence[Json]) -> list[Json]:
    """One row a metric, one cell a VAE; where there are several, the best is marked. Behind them what a linear code of
    each VAE's size reaches."""
    rows = []
    titles = measured(results)
    for where, name in itertools.product(("metrics", "linear_code"), titles):
        title = titles[name]
        summaries = [result.get(where, {}).get(name) for result in results]
        if not any(summaries):
            continue
        means = [summary["mean"] for summary in summaries if summary and summary["mean"] is not None]
        best = (max if title.better == "higher" else min)(means) if len(means) > 1 and where == "metrics" else None
        cells = []
        for summary in summaries:
            if summary is None or summary["mean"] is None:
                cells.append({"note": (summary or {}).get("note", "not measured")})
                continue
            interval = summary["ci95"]
            cells.append(
                {
                    "value": number(name, summary["mean"]),
                    "interval": [number(name, end) for end in interval] if interval else None,
                    "best": summary["mean"] == best,
                    "note": summary.get("note"),
                }
            )
        arrow = "↑" if title.better == "higher" else "↓"
        named, meaning = heading(name), title.meaning
        if where == "linear_code":
            named, meaning = f"{named} of {LINEAR}", LINEAR_MEANING
        rows.append({"heading": named, "arrow": arrow, "meaning": meaning, "cells": cells})
    return rows


def published() -> list[Json]:
    """Published results, each with its source; their protocols differ from ours and from each other. gFID is the FID
    of samples of a generator that was trained on such latents."""
    rows: list[Json] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    written = []
    for row in rows:
        shape = f"f{row['factor']}" + (f" c{row['channels']}" if "channels" in row else "")
        numbers = [f"{row[name]:g}" if name in row else "" for name in ("rfid", "psnr", "ssim", "lpips", "gfid")]
        sources = dict.fromkeys(row[name] for name in ("source", "gfid_source") if name in row)
        written.append(
            {
                "cells": [row["model"], shape, row["data"]],
                "numbers": numbers,
                "generator": row.get("generator", ""),
                "source": "; gFID: ".join(sources),
            }
        )
    return written


def latents(result: Json) -> Json | None:
    """KL per channel, each channel's distribution, and the spectra, of one VAE."""
    found = result.get("latents")
    if not found:
        return None
    kl, data = found["kl_nats_per_image"], result["data"]
    spectrum, item = found["spectrum"], noun(data).removesuffix("s")
    frames = data.get("all_frames", data["images"]) / data["images"]
    samples = data["sounds"]["samples"] if "sounds" in data else data["resolution"] ** 2 * frames
    before_after = [
        Series("original", _frequencies(spectrum["original"]), faint=True),
        Series("reconstruction", _frequencies(spectrum["reconstruction"])),
    ]
    # a codebook or a distilled encoder has no variance, hence no KL
    rows = [
        {
            "number": channel,
            "kl": amount(kl[channel]) if kl else "",
            "mean": f"{found['mean'][channel]:+.3f}",
            "std": f"{found['std'][channel]:.3f}",
            "noise": f"{found['noise_std'][channel]:#.3g}",
        }
        for channel in ends(kl or found["std"])
    ]
    rate = (
        {
            "kl_total": f"{sum(kl):,.0f}",
            "rate": sounds.of_kl(sum(kl) / math.log(2) / samples, data),
            "kl": bar_chart(kl, label=f"KL per latent channel in nats per {item}", y=f"nats per {item}"),
            "extremes": extremes(kl, "nats"),
        }
        if kl
        else {"kl_total": None}
    )
    return rate | {
        "name": result["vae"]["name"],
        "channels": rows,
        "count": len(found["mean"]),
        "codes": about_codes({"codes": result.get("codes", {}).get("codebooks")}),
        "image_spectrum": line_chart(
            before_after,
            label="power spectra of originals and reconstructions",
            x=f"cycles per {'sample' if 'sounds' in data else 'pixel'}",
            y=POWER,
            log=True,
        ),
        "latent_spectrum": latent_spectrum(spectrum["latents"]),
    }


def frame_curves(results: Sequence[Json]) -> list[Json]:
    """Charts of metrics over the frames of clips: means over clips with their intervals, a line for each VAE."""
    charts = []
    for name in of_curves(results[0].get("by_frame", {})):
        series = [_over_frames(result["vae"]["name"], result["by_frame"][name]) for result in results]
        drawing = line_chart(
            series, label=f"{title(name).heading} over the frames of a clip", x="frame", y=heading(name)
        )
        better = title(name).better
        charts.append({"title": title(name).heading, "hint": f"{better} is better.", "drawing": drawing})
    return charts


def frame_rate(data: Json) -> float:
    """Frames a second of the page's films: those of the clips, where they are known."""
    clips = data.get("clips", {"rate": None, "stride": 1})
    return float(clips["rate"] / clips["stride"] if clips["rate"] else UNKNOWN_RATE)


def _over_frames(name: str, found: Sequence[Json]) -> Series:
    measured = [(float(place), one) for place, one in enumerate(found, 1) if one["mean"] is not None]
    band = [(place, *one["ci95"]) for place, one in measured if one["ci95"]]
    return Series(name, [(place, one["mean"]) for place, one in measured], band=band)


def latent_spectrum(power: Sequence[float]) -> Markup | None:
    """Chart of the power spectrum, with white noise of the same power; None for a latent of one position."""
    if len(power) < 3:
        return None
    points = _frequencies(power)
    average = sum(value for _, value in points) / len(points)
    series = [
        Series("latents", points),
        Series("white noise of equal power", [(x, average) for x, _ in points], faint=True),
    ]
    label = "power spectrum of the latents"
    return line_chart(series, label=label, x="cycles per latent position", y=POWER, log=True)


def _frequencies(power: Sequence[float]) -> list[tuple[float, float]]:
    """Power by cycles per sample, 0 to 0.5; the mean (frequency 0) is no texture and is left out."""
    last = max(1, len(power) - 1)
    return [(0.5 * place / last, value) for place, value in enumerate(power) if place]


def store(statistics: Json) -> Json:
    """Statistics that the latent store measured for config.json, each with its interval."""
    known = intervals.recorded(statistics) or {}
    rows = []
    for name in ("scaling_factor", "shift_factor"):
        if statistics.get(name) is not None:
            low_high = known.get(name)
            rows.append(
                {
                    "name": name,
                    "value": f"{statistics[name]:.5f}",
                    "interval": [f"{end:.5f}" for end in low_high] if low_high else None,
                }
            )
    return {"images": f"{statistics['images']:,}", "rows": rows}


def protocol(results: Sequence[Json]) -> list[str]:
    """The protocol in sentences."""
    used, data = results[0]["protocol"], results[0]["data"]
    decoded = "the mode of the posterior" if used["posterior"] == "mode" else "one keyed draw of the posterior"
    bad = data["quarantined"]
    left_out = f", {bad} could not be read and {'is' if bad == 1 else 'are'} left out" if bad else ""
    if "sounds" in data:
        return sounds.protocol(used, data, decoded, left_out)
    clips = "clips" in data
    whole = decoding_of(data.get("preprocessing", ""))
    as_they_are = whole is not None and whole.resize == "none"
    size = (
        "Pixels as they are" if as_they_are else f"Short side resized to {data['resolution']} px (bicubic, antialiased)"
    )
    return [
        f"Protocol “{used['name']}”, version {used['version']}.",
        f"{data['images']:,} {noun(data)}{in_words(data)} of {data['source']}{left_out}; each counted exactly once.",
        f"{size}, centre crop of {data['resolution']} px.{how_decoded(data)}",
        f"Decoded from {decoded}; output clamped to [−1, 1] and {ROUNDING[used['rounding']]} before every metric.",
        f"PSNR per {'frame' if clips else 'image'} on the 8-bit range, then averaged; SSIM with a Gaussian "
        f"window of 11, σ 1.5, range 255.{' A clip’s value is the mean over its frames.' if clips else ''}",
        f"Intervals: 95 % of the mean over {noun(data)} (Student’s t); {noun(data)} are taken as independent, which "
        f"{'those of one video' if clips else 'crops of one photograph'} are not.",
    ]


def fingerprints(results: Sequence[Json]) -> list[Json]:
    """Fingerprints of the VAEs and images that were measured, to the bit."""
    return [
        {
            "name": result["vae"]["name"],
            "source": result["vae"]["source"],
            "encoder": result["vae"]["encoder_fingerprint"],
            "decoder": result["vae"]["decoder_fingerprint"],
        }
        for result in results
    ]


def commands(contents: Contents) -> list[str]:
    """The commands that give this page again."""
    lines = []
    if contents.config_text:
        program = "train.diffusion" if contents.diffusion else "train.prior" if contents.prior else "train.autoencoder"
        config = f"{contents.config.get('output_dir', contents.home)}/config.yaml"
        lines.append(shlex.join([*words_of(program), config]))
    if contents.results:
        lines += filter(None, [contents.results[0].get("settings", {}).get("command")])  # none if training measured
    lines.append(f"ldm-vae report {contents.config.get('output_dir', contents.name)}")
    return lines
