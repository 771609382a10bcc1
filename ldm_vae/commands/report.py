"""`ldm-vae report RUN...`: make the page of a run, or of an evaluation, again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core.request import argument

HELP = "write the HTML report of a run or an evaluation"
DESCRIPTION = """\
Write RUN/report/index.html: before and after, metrics with intervals, curves, latents, worst cases. It is one file
without external resources. RUN is a run folder, or the output of `ldm-vae evaluate ... --output RUN` (its page is
RUN/index.html).

  ldm-vae report runs/demo
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    runs: tuple[Path, ...] = argument("RUN", "a run folder or an evaluation's output", nargs="+")


def run(request: Request) -> None:
    from ldm_vae.report import build_report

    for folder in request.runs:
        print(build_report(folder))
