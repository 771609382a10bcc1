"""`eval.speed start`: what one waits for. From launch, each in a process of its own:

- `python`: an interpreter that does nothing;
- `help`: `ldm-vae --help`;
- `import_torch`: `import torch`, which nothing that trains can do without;
- `import_libraries`: all that the smoke run imports of other people's;
- `import_library`: `import ldm_vae`;
- `first_step`: `ldm-vae train configs/smoke.yaml` until its first update stands in metrics.jsonl, beside
  `import_libraries`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ldm_vae.core.errors import WorkError
from ldm_vae.core.programs import find_config
from ldm_vae.demo.photographs import prepare_demo

from .timing import interleave, row

DEADLINE_SECONDS = 600.0  # seconds
COMMANDS = {
    "python": ["-c", "pass"],
    "help": ["-m", "ldm_vae", "--help"],
    "import_torch": ["-c", "import torch"],
    "import_libraries": [
        "-c",
        "import torch, torchvision, accelerate, pydantic, tyro, yaml, PIL.Image, pyarrow.parquet, filelock\n"
        "from diffusers import AutoencoderKL, AutoencoderTiny, VQModel",
    ],
    "import_library": ["-c", "import ldm_vae"],
}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        prepare_demo(demo)
        contenders = {name: _runs(arguments) for name, arguments in COMMANDS.items()}
        contenders["first_step"] = lambda: first_step(demo, Path(folder))
        times = interleave(contenders, options.rounds, "start")
    return [row(name, times, name, "import_libraries" if name == "first_step" else None) for name in contenders]


def _runs(arguments: list[str]) -> Any:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}  # nothing of the smoke run needs a network


def first_step(demo: Path, folder: Path) -> None:
    """Launch the smoke run, wait for its first line of metrics, end it."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        metrics = Path(output) / "run" / "metrics.jsonl"
        knobs = {
            "--output_dir": metrics.parent,
            "--data.path": demo / "train",
            "--validation_data.path": demo / "heldout",
            "--log_every_images": 1,
        }
        flags = [str(part) for pair in knobs.items() for part in pair]
        command = [sys.executable, "-m", "ldm_vae", "train", str(find_config("smoke")), *flags]
        with open(Path(output) / "said", "w+", encoding="utf-8") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=_environment())
            deadline = time.monotonic() + DEADLINE_SECONDS
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None or time.monotonic() > deadline:
                        said.seek(0)
                        raise WorkError(f"eval.speed start: the smoke run took no step: {said.read().strip()[-300:]}")
                    time.sleep(0.01)
            finally:
                process.kill()
                process.wait()
