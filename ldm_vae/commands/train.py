"""`ldm-vae train CONFIG`: the training program, from a clone or from an installed wheel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ldm_vae.core.request import argument

HELP = "train or fine-tune an autoencoder"
DESCRIPTION = ""  # the program's own docstring is the help

# everything behind the verb belongs to the program, `--help` too
ADD_HELP = False
PREFIX_CHARS = "\0"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments that are passed on to the program."""

    arguments: tuple[str, ...] = argument("ARGUMENT", "of the program", nargs=argparse.REMAINDER)


def run(request: Request) -> None:
    from ldm_vae.core import programs

    programs.run_with_config("train/autoencoder.py", [*request.arguments])
