"""`ldm-vae diffuse CONFIG`: a diffusion model on a latent store, from a clone or from an installed wheel."""

from __future__ import annotations

import argparse

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, add_arguments

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "add_arguments", "run"]

HELP = "train a small diffusion model on a latent store"
DESCRIPTION = ""  # the program's own docstring is the help


def run(arguments: argparse.Namespace) -> None:
    from ldm_vae.core import programs

    programs.run_with_config("train/diffusion.py", arguments.arguments)
