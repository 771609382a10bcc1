"""`ldm-vae evaluate VAE... DATA --output DIR`: the reconstruction protocol, from a clone or from an installed wheel."""

from __future__ import annotations

import argparse

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, add_arguments

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "add_arguments", "run"]

HELP = "measure reconstruction of one or several VAEs on images"
DESCRIPTION = ""  # the program's own help is shown


def run(arguments: argparse.Namespace) -> None:
    from ldm_vae.core import programs

    programs.run("eval/reconstruction.py", arguments.arguments or ["--help"])
