"""Checks and benchmarks of a CUDA device in one run of bounded length: what matters most first, each part a process of
its own with a limit of its own, so that one which fails or hangs costs no other.

    python -m eval.chip --output DIR --minutes 8
    python -m eval.chip --output DIR --minutes 3 --only gpu_fast roofline

DIR/chip.json is written after each part: the machine, and for each part its rows (as in speed.json), seconds and status
(None: it ran into its limit). DIR/chip.log has what the parts printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser

from .speed.timing import machine

TESTS = ("-m", "pytest", "-q", "-m", "gpu or not slow", "-p", "no:cacheprovider", "-o", "filterwarnings=ignore")
# name => (seconds at most, arguments of Python); `eval.speed` unless they are given; in the order in which they run
PARTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "gpu_fast": (200, ("--rounds", "7")),
    "roofline": (120, ("--rounds", "5")),
    "tests": (120, (*TESTS, "tests/test_group_norm.py", "tests/test_gpu.py", "-k", "not compiled")),
    "gpu_encoder": (60, ("--rounds", "7")),
    "gpu_batch": (120, ("--rounds", "3")),
    "gpu_denoiser": (60, ("--rounds", "7")),
    "gpu_encode": (90, ("--rounds", "1")),
    "gpu_regions": (240, ("--rounds", "7")),
    "tests_compiled": (240, (*TESTS, "tests/test_gpu.py", "-k", "compiled")),
    "gpu_compiled": (400, ("--rounds", "5")),
}

SHORTEST = 20  # seconds below which a part is not begun


def main() -> None:
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"machine": machine(), "parts": {}}
    for name in options.only or PARTS:
        seconds = min(PARTS[name][0], end - time.monotonic())
        if seconds < SHORTEST:
            print(f"{name}: no time left", flush=True)
            continue
        results["parts"][name] = part(name, seconds, options.output / "chip.log")
        (options.output / "chip.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.chip", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where chip.json goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (8)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"these parts, in this order: {', '.join(PARTS)}"
    )
    found = parser.parse_args()
    if not found.minutes > 0:
        raise UsageError(f"minutes: expected more than 0, got {found.minutes:g}")
    return found


def part(name: str, seconds: float, log: Path) -> dict[str, Any]:
    """Run one, its output in the log and the last of it here."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = PARTS[name][1]
        command = [sys.executable, *arguments]
        if arguments[0] != "-m":
            command = [sys.executable, "-m", "eval.speed", name, "--output", folder, *arguments]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            status, printed = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            status, printed = None, (error.stdout or b"").decode(errors="replace")
        rows = Path(folder) / "speed.json"
        found = json.loads(rows.read_text(encoding="utf-8"))["results"] if rows.is_file() else []
    took = time.monotonic() - start
    with log.open("a", encoding="utf-8") as file:
        file.write(f"===== {name}: status {status}, {took:.0f} s\n{printed}\n")
    lines = [line for line in printed.splitlines() if "USDT" not in line]
    print(f"===== {name}: status {status}, {took:.0f} s", *lines[-40:], sep="\n", flush=True)
    return {"seconds": took, "status": status, "rows": found}


if __name__ == "__main__":
    run_program(main)
