"""RUN/report/index.html: one file, no network, for a screen or a phone, light or dark; what has no data is left out.

build_report(Path("runs/demo"))          a run: what it logged, measured and stored
build_report(Path("compared"))           what eval.reconstruction or eval.latent_space wrote
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ldm_vae import __version__
from ldm_vae.core import atomic_io
from ldm_vae.report import diffusion, latent_space, tables
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
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = contents.results
    names = [result["vae"]["name"] for result in results]
    measured = contents.statistics or {}
    view: dict[str, Any] = {
        "title": contents.name,
        "kind": "Diffusion report" if contents.diffusion and not results else "Autoencoder report",
        "subtitle": tables.subtitle(contents),
        "version": __version__,
        "names": names,
        "headline": tables.headline(contents),
        "gallery": gallery(contents.home, contents.pictures, results),
        "shown_width": SHOWN_WIDTH,
        "metrics": tables.metric_rows(results),
        "published": tables.published() if results else [],
        "charts": curves(contents.log, contents.config),
        "health": health(contents.log, contents.config),
        "adversary": adversary_change(contents.log, contents.config),
        "latents": [found for result in results if (found := tables.latents(result))],
        "store": tables.store(measured) if "scaling_factor" in measured else None,  # a store of indices has none
        "samples": samples(contents.samples),
        "diffusion": diffusion.run(contents.folder, contents.diffusion),
        "diffusability": diffusion.probe(contents.home, contents.diffusability),
        "latent_space": latent_space.section(contents.home, contents.latent_space),
        "protocol": tables.protocol(results) if results else [],
        "checksum": results[0]["data"]["checksum"] if results else "",
        "fingerprints": tables.fingerprints(results),
        "versions": results[0]["versions"] if results else {},
        "commands": tables.commands(contents),
        "config": contents.config_text,
    }
    return environment.get_template("index.html.j2").render(view)
