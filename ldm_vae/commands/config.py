"""`ldm-vae config [NAME]`: the configs that ship with the project, or one of them."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_vae.core.request import argument

HELP = "list the included configs, or print one"
DESCRIPTION = """\
Without NAME, list the included configs, each with the first sentence of its header. With NAME, print that file, to copy
and edit it:

  ldm-vae config kl_f8_d4 > mine.yaml
  ldm-vae train mine.yaml --dry_run     # the resolved config
"""


INDENT = " " * 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    name: str | None = argument("NAME", "name of an included config, or a path", nargs="?")


def run(request: Request) -> None:
    import itertools
    import shutil
    import textwrap

    from ldm_vae.core import programs
    from ldm_vae.core.text import first_sentence

    if request.name is not None:
        print(programs.find_config(request.name).read_text(encoding="utf-8"), end="")
        return
    width = max(min(shutil.get_terminal_size().columns, 120), 60)
    for name, path in programs.shipped_configs().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        header = itertools.takewhile(lambda line: line.startswith("#"), lines)
        sentence = first_sentence("\n".join(line.lstrip("# ") for line in header))
        print(name, *textwrap.wrap(sentence, width, initial_indent=INDENT, subsequent_indent=INDENT), sep="\n")
