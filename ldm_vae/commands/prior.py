"""`ldm-vae prior CONFIG`: a prior over codes on an index store, from a clone or from an installed wheel."""

from __future__ import annotations

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, Request

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "Request", "run"]

HELP = "train a prior over the codes of an index store"
DESCRIPTION = ""  # the program's own docstring is the help


def run(request: Request) -> None:
    from ldm_vae.core import programs

    programs.run_with_config("train/prior.py", [*request.arguments])
