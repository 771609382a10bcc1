"""The pictures of the page: originals, what each VAE made of them, differences and error maps, embedded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_vae.metrics.titles import TITLES, number
from ldm_vae.report import images

Json = dict[str, Any]

SHOWN_WIDTH = 256  # CSS pixels of a picture in the gallery: a 64 px crop is enlarged four times


def gallery(home: Path, pictures: Sequence[Json], results: Sequence[Json]) -> Json | None:
    """Everything the template needs of `pictures` (pictures.json): shown and worst ones, and the error maps' scale."""
    names = [result["vae"]["name"] for result in results]
    worst = {entry["index"] for entry in results[0].get("worst", [])} if results else set()
    folder = home / "pictures"
    pixels = [
        (images.read_pixels(folder / f"{picture['name']}.original.png"), [
            images.read_pixels(folder / vae["reconstruction"]) for vae in picture["vaes"]
        ])
        for picture in pictures
    ]  # fmt: skip
    if not pixels:
        return None
    errors = [[images.error(original, other) for other in others] for original, others in pixels]
    # one scale for all, so that maps compare; a few outliers may saturate
    largest = float(np.quantile(np.concatenate([error.ravel() for row in errors for error in row]), 0.998))
    cards = []
    for picture, (original, others), row in zip(pictures, pixels, errors, strict=True):
        vaes = [
            {
                "name": name,
                "reconstruction": images.embed(folder / vae["reconstruction"]),
                "difference": images.difference(original, other),
                "heat": images.heat_map(error, largest),
                "latent": images.embed(folder / vae["latent"]),
                "metrics": _metrics(vae["metrics"]),
            }
            for name, vae, other, error in zip(names, picture["vaes"], others, row, strict=True)
        ]
        cards.append(
            {
                "name": picture["name"],
                "key": picture["key"],
                "index": picture["index"],
                "kind": picture["kind"],
                "width": original.shape[1],
                "height": original.shape[0],
                "original": images.embed(folder / f"{picture['name']}.original.png"),
                "vaes": vaes,
            }
        )
    return {
        "shown": [card for card in cards if card["kind"] == "shown"],
        "worst": [card for card in cards if card["kind"] == "worst"],
        "worst_above": [card["key"] for card in cards if card["kind"] == "shown" and card["index"] in worst],
        "largest": f"{largest:.0f}",
        "gain": images.DIFFERENCE_GAIN,
        "stops": ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in images.STOPS),
        "pixelated": pixels[0][0].shape[1] < SHOWN_WIDTH,
    }


def _metrics(values: Json) -> list[Json]:
    chosen = [name for name in ("psnr", "ssim", "lpips_alex") if name in values] or list(values)[:3]
    return [
        {"heading": TITLES[name].heading, "value": number(name, values[name]), "unit": TITLES[name].unit}
        for name in chosen
    ]
