"""`ldm-vae completion SHELL`: a script that completes verbs, flags and their choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm_vae.core.request import argument

HELP = "print a completion script for bash, zsh or tcsh"
DESCRIPTION = """\
Print a script by which the shell completes verbs, flags, choices and files. Once:

  ldm-vae completion bash >> ~/.bash_completion
  ldm-vae completion zsh > ~/.zfunc/_ldm-vae       # a folder of $fpath, before compinit
  ldm-vae completion tcsh >> ~/.tcshrc
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    shell: Literal["bash", "zsh", "tcsh"] = argument("SHELL", "bash, zsh or tcsh")


def run(request: Request) -> None:
    import shtab

    from ldm_vae.cli import parser

    print(shtab.complete(parser(), request.shell))
