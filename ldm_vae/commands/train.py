"""`ldm-vae train CONFIG`: the training program, from a clone or from an installed wheel."""

from __future__ import annotations

import argparse

HELP = "train or fine-tune an autoencoder"
DESCRIPTION = ""  # the program's own docstring is the help

# everything behind the verb belongs to the program, `--help` too
ADD_HELP = False
PREFIX_CHARS = "\0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(arguments: argparse.Namespace) -> None:
    from ldm_vae.core import programs

    programs.run_with_config("train/autoencoder.py", arguments.arguments)
