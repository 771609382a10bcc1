"""The pictures of the page: originals, what each VAE made of them, differences and error maps, embedded; of clips
films, and the metrics of each frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ldm_vae.metrics.titles import heading, number, title
from ldm_vae.report import images
from ldm_vae.report.charts import Series, line_chart

Json = dict[str, Any]

SHOWN_WIDTH = 256  # CSS pixels of a picture in the gallery: a 64 px crop is enlarged four times


def gallery(home: Path, pictures: Sequence[Json], results: Sequence[Json]) -> Json | None:
    """Everything the template needs of `pictures` (pictures.json): shown and worst ones, and their maps' scales."""
    names = [result["vae"]["name"] for result in results]
    pictures = [picture for picture in pictures if "sound" not in picture["vaes"][0]]  # which are sounds.py's
    worst = {entry["index"] for entry in results[0].get("worst", [])} if results else set()
    folder = home / "pictures"
    pixels = [
        (images.read_pixels(images.inside(folder, f"{picture['name']}.original.png")), [
            images.read_pixels(images.inside(folder, vae["reconstruction"])) for vae in picture["vaes"]
        ])
        for picture in pictures
    ]  # fmt: skip
    if not pixels:
        return None
    shown = sum(original[..., 0].size * (1 + len(others)) for original, others in pixels)
    forms = [images.film_of(images.inside(folder, f"{picture['name']}.original.png"), shown) for picture in pictures]
    errors = [[images.error(original, other) for other in others] for original, others in pixels]
    perceived = [
        [images.read_map(images.inside(folder, vae["lpips"])) if "lpips" in vae else None for vae in picture["vaes"]]
        for picture in pictures
    ]
    # one scale for all of a kind, so that maps compare; the worst would leave nothing to be seen of the others
    scales: dict[str, Json] = {}
    for kind in ("shown", "worst"):
        chosen = [place for place, picture in enumerate(pictures) if picture["kind"] == kind]
        differences = (np.abs(other - pixels[place][0]) for place in chosen for other in pixels[place][1])
        scales[kind] = {
            "reach": math.ceil(max(1.0, _end(differences))),
            "largest": _end(error for place in chosen for error in errors[place]),
            "most": _end(values for place in chosen for values in perceived[place] if values is not None),
        }
    cards = []
    for picture, (original, others), row, seen, film in zip(pictures, pixels, errors, perceived, forms, strict=True):
        scale = scales[picture["kind"]]
        vaes = [
            {
                "name": name,
                "reconstruction": images.embed(images.inside(folder, vae["reconstruction"]), film),
                "difference": images.difference(original, other, scale["reach"], film),
                "heat": images.heat_map(error, scale["largest"], film),
                "lpips": None if where is None else images.heat_map(where, scale["most"], film),
                **_latent(images.inside(folder, vae["latent"])),
                "metrics": chosen_metrics(vae["metrics"]),
            }
            for name, vae, other, error, where in zip(names, picture["vaes"], others, row, seen, strict=True)
        ]
        cards.append(
            {
                "name": picture["name"],
                "key": picture["key"],
                "index": picture["index"],
                "kind": picture["kind"],
                "original": images.embed(images.inside(folder, f"{picture['name']}.original.png"), film),
                "frames": film.frames,
                "curves": _curves(names, picture["vaes"]),
                "vaes": vaes,
            }
        )
    return {
        "shown": [card for card in cards if card["kind"] == "shown"],
        "worst": [card for card in cards if card["kind"] == "worst"],
        "worst_above": [card["key"] for card in cards if card["kind"] == "shown" and card["index"] in worst],
        "scales": scales,
        "stops": ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in images.STOPS),
        "pixelated": pixels[0][0].shape[1] < SHOWN_WIDTH,
        "form": max(forms, key=lambda film: film.frames),
    }


def _latent(path: Path) -> Json:
    film = images.film_of(path)
    return {"latent": images.embed(path, film), "latent_frames": film.frames}


def _curves(names: Sequence[str], vaes: Sequence[Json]) -> list[Markup]:
    """Charts of a clip's metrics frame by frame, a line for each VAE; none of an image."""
    measured = [vae.get("by_frame", {}) for vae in vaes]
    return [
        line_chart(
            [Series(name, list(enumerate(found[metric], 1))) for name, found in zip(names, measured, strict=True)],
            label=f"{title(metric).heading} of each frame", x="frame", y=heading(metric),
        )
        for metric in of_curves(measured[0])
    ]  # fmt: skip


def of_curves(measured: Json) -> list[str]:
    """Metrics that are drawn over the frames."""
    return [name for name in ("psnr", "lpips_alex") if name in measured] or list(measured)[:2]


def _end(maps: Iterable[images.Pixels]) -> float:
    """End of the scale of such maps: a few outliers lie beyond it. Of a large map every few values."""
    values = [found.ravel()[:: found.size // 2**18 + 1] for found in maps]
    return float(np.quantile(np.concatenate(values), 0.998)) if values else 0.0


KINDS = {  # of samples: title and explanation
    "normal": (
        "Drawn from N(0, I)",
        "The prior of the evidence bound. Where the KL weight is as small as 1e-6 the latents are nowhere near it, and "
        "these are noise: the autoencoder alone is no generator.",
    ),
    "field": (
        "Drawn from a Gaussian field",
        "With the latents' measured mean, deviation and spectrum. What these lack a diffusion model has to learn.",
    ),
}


def samples(files: Sequence[Path]) -> list[Json]:
    """The pictures of ldm_vae/metrics/samples.py, kind by kind; those of another name as they are."""
    kinds = list(dict.fromkeys(path.stem.rpartition("-")[0] for path in files))
    groups = []
    for kind in sorted(kinds, key=lambda kind: (kind not in KINDS, list(KINDS).index(kind) if kind in KINDS else 0)):
        title, text = KINDS.get(kind, (kind, ""))
        own = [path for path in files if path.stem.rpartition("-")[0] == kind]
        first = images.read_pixels(own[0])
        film = images.film_of(own[0], len(files) * first[..., 0].size)
        groups.append({"title": title, "text": text, "pictures": [images.embed(path, film) for path in own],
                       "frames": film.frames, "pixelated": first.shape[1] < SHOWN_WIDTH})  # fmt: skip
    return groups


USUAL = ("psnr", "ssim", "lpips_alex", "flicker", "si_sdr", "snr", "mel_distance", "log_spectral_distance")


def chosen_metrics(values: Json) -> list[Json]:
    """Metrics that stand beside a picture."""
    chosen = [name for name in USUAL if name in values] or list(values)[:3]
    return [
        {"heading": title(name).heading, "value": number(name, values[name]), "unit": title(name).unit}
        for name in chosen
    ]
