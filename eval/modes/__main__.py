"""Models of images whose distribution is known (`ldm-vae assets factors`), beside the truth.

    python -m eval.modes prior --run runs/factors_prior --vae runs/factors_vq/vae --output runs/modes
    python -m eval.modes evidence --output runs/modes            # minutes on one CPU core
    python -m eval.modes disentanglement --output runs/modes     # minutes; five seeds for each weight of the KL

prior: the probability that a trained prior over codes gives each image, beside its own. evidence: the lower bound of a
VAE with two latent dimensions, its importance-weighted bounds and the integral itself. disentanglement: the mutual
information gap of beta-VAEs over weights and seeds, and of the same models with their latents rotated.

DIR then holds WHAT.json, WHAT.md and WHAT.png; docs/discrete.md and docs/vae_theory.md explain them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.ownership import own
from ldm_vae.core.request import Parser
from ldm_vae.metrics import result

from . import disentanglement, evidence, plot, prior

# name => what measures, what makes a table of it, and what draws it; each lives in a file of its own
TABLES: dict[str, tuple[Callable[[argparse.Namespace], Any], Callable[[Any], str], Callable[[Any, Path], None]]] = {
    "prior": (prior.run, prior.table, prior.draw),
    "evidence": (evidence.run, evidence.table, evidence.draw),
    "disentanglement": (disentanglement.run, disentanglement.table, disentanglement.draw),
}


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.modes", description=__doc__)
    add = parser.add_argument
    add("what", choices=[*TABLES], metavar="WHAT", help="prior, evidence or disentanglement")
    add("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--run", type=Path, metavar="RUN", help="prior: the run of train.prior")
    add("--vae", metavar="VAE", help="prior: the VAE whose codes it learned")
    add("--samples", type=int, default=4096, help="prior: draws whose images are looked up (4,096)")
    add("--images", type=int, default=19_200, help="of the VAEs: images that each sees in training (19,200)")
    add("--batch_size", type=int, default=64, help="images of a step, and of a decode (64)")
    add("--seeds", type=int, default=5, help="disentanglement: repetitions of each weight (5)")
    add("--betas", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], help="its weights of the KL (1 2 4 8)")
    add("--steps", type=int, default=400, help="evidence: intervals of the grid in each dimension (400)")
    found = parser.parse_args()
    for name, least in {"samples": 1, "batch_size": 1, "seeds": 1, "images": found.batch_size}.items():
        if getattr(found, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(found, name)}")
    if found.steps < 2 or found.steps % 2:
        raise UsageError(f"steps: expected an even number, got {found.steps}")
    if not all(beta > 0 for beta in found.betas):
        raise UsageError(f"betas: expected weights above 0, got {', '.join(f'{beta:g}' for beta in found.betas)}")
    for name in ("run", "vae") if found.what == "prior" else ():
        if getattr(found, name) is None:
            raise UsageError(f"{name}: prior needs --run RUN of train.prior and --vae VAE")
    return found


def main() -> None:
    options = arguments()
    measure, table, draw = TABLES[options.what]
    plot.pyplot()  # what is missing is said now and not after minutes
    with own(options.output, "output"):
        found = measure(options)
        place = options.output / options.what
        found |= {"settings": result.command("eval.modes"), "versions": result.versions()}
        result.write(place.with_suffix(".json"), found)
        result.write(place.with_suffix(".md"), table(found) + "\n")
        draw(found, place.with_suffix(".png"))
        print(table(found))
        print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    run_program(main)
