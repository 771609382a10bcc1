"""`ldm-vae latent_space VAE DATA --output DIR`: measure the latent space, from a clone or an installed wheel."""

from __future__ import annotations

import argparse

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, add_arguments

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "add_arguments", "run"]

HELP = "measure the latent space of a VAE on images"
DESCRIPTION = ""  # the program's own help is shown


def run(arguments: argparse.Namespace) -> None:
    from ldm_vae.core import programs

    programs.run("eval/latent_space.py", arguments.arguments or ["--help"])
