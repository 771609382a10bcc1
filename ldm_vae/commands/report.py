"""`ldm-vae report RUN...`: make the page of a run, or of an evaluation, again."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write the page that shows a run or an evaluation"
DESCRIPTION = """\
Write RUN/report/index.html: before and after, numbers with intervals, curves, latents, worst cases. One file that needs
no network. RUN is a run folder, or what `ldm-vae evaluate ... --output RUN` has written (its page is RUN/index.html).

  ldm-vae report runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder or an evaluation's output")


def run(arguments: argparse.Namespace) -> None:
    from ldm_vae.report import build_report

    for folder in arguments.runs:
        print(build_report(folder))
