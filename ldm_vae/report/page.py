"""RUN/report/index.html: one file, no network, for a screen or a phone, light or dark; what has no data is left out.

build_report(Path("runs/demo"))          a run: what it logged, measured and stored
build_report(Path("compared"))           what eval.reconstruction or eval.latent_space wrote
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from ldm_vae import __version__
from ldm_vae.core import atomic_io
from ldm_vae.core.validation import as_written
from ldm_vae.metrics.result import noun
from ldm_vae.report import diffusion, latent_space, prior, sounds, tables
from ldm_vae.report.contents import Contents, read_contents
from ldm_vae.report.gallery import SHOWN_WIDTH, gallery, samples
from ldm_vae.report.training import adversary_change, curves, health

TEMPLATES = Path(__file__).parent / "page"


def build_report(run: Path) -> Path:
    """Write the page of a run folder or of an evaluation's output; gives its path.

    Raises:
        UsageError: `run` is neither of them.
        WorkError: a file in it cannot be read.
    """
    contents = read_contents(Path(run))
    html = render(contents)
    contents.home.mkdir(parents=True, exist_ok=True)
    path = contents.home / "index.html"
    # a page may be open while training rewrites it: it is whole at any time
    atomic_io.replace(path, atomic_io.data(html.encode()))
    return path


def render(contents: Contents) -> str:
    """The page as text."""
    home, log, results = contents.home, contents.log, contents.results
    view: dict[str, Any] = {
        "title": contents.name,
        "kind": f"{_kind(contents)} report",
        "version": __version__,
        "shown_width": SHOWN_WIDTH,
        "config": contents.config_text,
    }
    # each file's sections by themselves: what cannot be shown is said of the file that it stands in
    with as_written(home / "metrics.json"):
        view |= {
            "published": tables.published() if results and "sounds" not in results[0]["data"] else [],
            "names": [result["vae"]["name"] for result in results],
            "subtitle": tables.subtitle(contents),
            "headline": tables.headline(contents),
            "metrics": tables.metric_rows(results),
            "items": noun(results[0]["data"]) if results else "images",
            "frame_curves": tables.frame_curves(results) if results else [],
            "rate": tables.frame_rate(results[0]["data"]) if results else 0.0,
            "latents": [found for result in results if (found := tables.latents(result))],
            "protocol": tables.protocol(results) if results else [],
            "checksum": results[0]["data"]["checksum"] if results else "",
            "fingerprints": tables.fingerprints(results),
            "versions": dict(results[0]["versions"]) if results else {},
            "commands": tables.commands(contents),
        }
    with as_written(home / "pictures" / "pictures.json"):
        view["gallery"] = gallery(home, contents.pictures, results)
        view["sounds"] = sounds.section(home, contents.pictures, results)
    with as_written(contents.folder / "config.yaml"):
        view |= {
            "charts": curves(log, contents.config),
            "health": health(log, contents.config),
            "adversary": adversary_change(log, contents.config),
        }
    with as_written(contents.folder / "latents" / "manifest.json"):
        measured = contents.statistics or {}
        # a store of indices has none
        view["store"] = tables.store(measured) if "scaling_factor" in measured else None
    with as_written(home / "samples"):
        view["samples"] = samples(contents.samples)
    with as_written(home / "diffusion.json"):
        view["diffusion"] = diffusion.run(contents.folder, contents.diffusion)
    with as_written(home / "prior.json"):
        view["prior"] = prior.run(contents.folder, contents.prior)
    with as_written(home / "diffusability.json"):
        view["diffusability"] = diffusion.probe(home, contents.diffusability)
    with as_written(home / "latent_space.json"):
        view["latent_space"] = latent_space.section(home, contents.latent_space)
    with as_written(contents.folder):
        try:
            return templates().get_template("index.html.j2").render(view)
        except UndefinedError as error:
            raise ValueError(str(error)) from error


@functools.cache
def templates() -> Environment:
    """The page's templates, each compiled once: a training renders its page anew at every validation."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment


def _code(sentence: str) -> Markup:
    """A sentence of a terminal or of Markdown, `code` in it as an element."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def _kind(contents: Contents) -> str:
    if contents.results:
        return "Autoencoder"
    if contents.diffusion:
        return "Diffusion"
    if contents.prior:
        return "Prior"
    return "Probe" if contents.diffusability else "Autoencoder" if contents.log else "Latent space"
