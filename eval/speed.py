"""Measure the speed of a part beside what it competes with, in one run on one machine.

    python -m eval.speed data --output runs/speed

Contenders take turns (A B C, A B C, ...), the ratio is taken within each round. DIR/speed.json then holds the machine
and one row for each figure; `ratio.median` above 1 means that the row's name is faster than `ratio.to`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm_vae.errors import UsageError, run_program

from . import speed_data, speed_encode, speed_read, speed_train
from .timing import machine

# name => (one line of help, what it runs); each lives in a file of its own
BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], list[dict[str, Any]]]]] = {
    "train": (
        "one generator and one discriminator update: seconds, operations and memory, beside published recipes",
        speed_train.run,
    ),
    "encode": (
        "a folder of photographs into a store, beside the encoder alone and beside the usual script",
        speed_encode.run,
    ),
    "read": (
        "random batches of latents from a store, beside memory and other readers; opening ten million samples",
        speed_read.run,
    ),
    "data": (
        "images decoded, cropped and batched per core, beside a plain datasets + DataLoader pipeline",
        speed_data.run,
    ),
}


def main() -> None:
    options = arguments()
    results = []
    for name in BENCHMARKS if options.what == "all" else [options.what]:
        results += BENCHMARKS[name][1](options)
    options.output.mkdir(parents=True, exist_ok=True)
    place = options.output / "speed.json"
    place.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    print(f"\n{place}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = "; ".join(f"{name}: {text}" for name, (text, _) in BENCHMARKS.items())
    parser.add_argument("what", choices=[*BENCHMARKS, "all"], help=known)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where speed.json goes")
    parser.add_argument("--compile", action="store_true", help="train: every recipe's networks under torch.compile")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender (7)")
    found = parser.parse_args()
    if found.rounds < 1:
        raise UsageError(f"rounds: expected at least 1, got {found.rounds}")
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a person reads them."""
    lines = [f"{'':28}{'median':>10}   ratio (min to max)"]
    for found in results:
        ratio = found.get("ratio")
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) x {ratio['to']}" if ratio else ""
        rate = f"   {found['images_per_s']:.0f} images/s" if "images_per_s" in found else ""
        rate += f"   {found['memory_mb']} MB" if "memory_mb" in found else ""
        figure = f"{found['median_s']:9.4g} s" if "median_s" in found else f"{found['value']:9.4g} {found['unit']}"
        lines.append(f"{found['name']:28}{figure:14} {shown}{rate}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
