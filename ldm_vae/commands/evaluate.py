"""`ldm-vae evaluate VAE... DATA --output DIR`: the reconstruction protocol, from a clone or from an installed wheel."""

from __future__ import annotations

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, Request

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "Request", "run"]

HELP = "measure reconstruction of one or several VAEs on images"
DESCRIPTION = ""  # the program's own help is shown


def run(request: Request) -> None:
    from ldm_vae.core import programs

    programs.run("eval/reconstruction.py", [*request.arguments] or ["--help"])
