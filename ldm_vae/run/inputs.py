"""Inputs of a training run, compared whenever it goes on: its images, its latent store.

The config names them by their paths; what lies there may be another thing by then. Then it is said, each time: the run
goes on with what is there now, and is not the one that its first checkpoints belong to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from ldm_vae.core import atomic_io
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import parse_json
from ldm_vae.data.inventory import Inventory, compare, take_inventory
from ldm_vae.data.source import Source
from ldm_vae.data.stream import Stream
from ldm_vae.latent_store.format.manifest import Manifest

GOES_ON = "the run goes on with what is there now; a run of these alone needs another output_dir"


def compare_images(
    run: Path, name: str, source: Source | Stream | None, accelerator: Accelerator, *, resumed: bool
) -> None:
    """The images of config section `name`, by RUN/inventory/NAME.safetensors; a stream cannot be looked at beforehand,
    its warning says so."""
    if source is None or isinstance(source, Stream):
        return
    if accelerator.is_main_process:
        path = run / "inventory" / f"{name}.safetensors"
        before = Inventory.load(path) if resumed else None
        if before is None:
            if resumed:
                _warn(f"{name}: nothing says which images this run began with; from here on those of now are compared")
            path.parent.mkdir(exist_ok=True)
            take_inventory(source).save(path)
        else:
            difference, stamped = compare(before, source)
            stamped.save(path)
            if difference:
                _warn(f"{name}: not the images that this run began with: {difference}; {GOES_ON}")
    accelerator.wait_for_everyone()


def compare_store(run: Path, name: str, manifest: Manifest, accelerator: Accelerator, *, resumed: bool) -> None:
    """The latent store of config field `name`, by RUN/inventory/NAME.json."""
    if accelerator.is_main_process:
        path = run / "inventory" / f"{name}.json"
        content = manifest.model_dump_json(include={"identity", "source", "shards"})
        now = {"samples": manifest.samples, "sha256": hashlib.sha256(content.encode()).hexdigest()}
        before = _read(path) if resumed else None
        if before is None:
            if resumed:
                _warn(f"{name}: nothing says which store this run began with; from here on that of now is compared")
            path.parent.mkdir(exist_ok=True)
            atomic_io.replace(path, atomic_io.data(json.dumps(now).encode() + b"\n"))
        elif before != now:
            _warn(
                f"{name}: not the store that this run began with: it has {manifest.samples:,} samples and had "
                f"{before.get('samples')}, its shards are others; {GOES_ON}"
            )
    accelerator.wait_for_everyone()


def _read(path: Path) -> dict[str, object] | None:
    try:
        tree = parse_json(read_bytes(path))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
