"""`ldm-vae latent_space VAE DATA --output DIR`: measure the latent space, from a clone or an installed wheel."""

from __future__ import annotations

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, Request

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "Request", "run"]

HELP = "measure the latent space of a VAE on images"
DESCRIPTION = ""  # the program's own help is shown


def run(request: Request) -> None:
    from ldm_vae.core import programs

    programs.run("eval/latent_space.py", [*request.arguments] or ["--help"])
