"""Checkpoints: one folder each, with every tensor in safetensors and everything else in JSON. No pickle.

    checkpoints/images-000012345/
        state.json            the objects' state as a JSON tree, tensors by name
        tensors.safetensors   the tensors
        config.yaml           the resolved config
        config.json, ...      what makes it an autoencoder to other programs (autoencoder/weights/checkpoint.py)
        checksums.json        SHA-256 of each file above; written last

A checkpoint is written beside its final name, fsynced and renamed, so what has the name is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm_vae.autoencoder.weights.checkpoint import TENSORS
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import first_line, parse_json

PREFIX = "images-"
FILES = ("config.yaml", "state.json", TENSORS)
CHECKSUMS = "checksums.json"


class Stateful(Protocol):
    """Anything that can be saved: networks, optimisers, averages."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


# --- state <=> JSON tree and tensors ----------------------------------------------------------------------------------


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """A JSON tree of `value`; its tensors go to `tensors` by name. Keys of dicts keep their type (Adam's are ints)."""
    if isinstance(value, torch.Tensor):
        # a clone: safetensors refuses tensors that share memory, as tied weights and views of one storage do
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, pack(inner, tensors, f"{path}.{key}")] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(inner, tensors, f"{path}.{index}") for index, inner in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {path}: {type(value).__name__} cannot be saved without pickle")


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(inner, tensors) for key, inner in content}
    return (tuple if kind == "tuple" else list)(unpack(inner, tensors) for inner in content)


# --- files ------------------------------------------------------------------------------------------------------------


def name(images_seen: int) -> str:
    """The checkpoint's folder name."""
    return f"{PREFIX}{images_seen:09d}"


def images_of(checkpoint: Path) -> int:
    """Images seen, as the folder's name tells."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save(
    folder: Path,
    images_seen: int,
    objects: Mapping[str, Stateful],
    config: str,
    info: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `folder`/images-N with the state of the named objects, the config's text, a few plain values, and further
    `files` by name.

    Raises:
        WorkError: it cannot be written (a full disk, no permission); older checkpoints stay as they are.
    """
    final = folder / name(images_seen)
    beside: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # filled beside its final name and renamed at the end, so a kill leaves the older checkpoints as they are
        beside = atomic_io.beside(final)
        tensors: dict[str, torch.Tensor] = {}
        state = {key: pack(thing.state_dict(), tensors, key) for key, thing in objects.items()}
        save_file(tensors, beside / TENSORS)
        (beside / "state.json").write_text(json.dumps({"info": dict(info), "objects": state}))
        (beside / "config.yaml").write_text(config, encoding="utf-8")
        for file, content in (files or {}).items():
            (beside / file).write_bytes(content)
        # last, over the files as they are on disk: a checkpoint without it, or with another one, counts as damaged
        sums = {path.name: _sha256(path) for path in sorted(beside.iterdir())}
        (beside / CHECKSUMS).write_text(json.dumps(sums, indent=1))
        atomic_io.put(beside, final)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        # looked for only now: `newest` reads whole checkpoints
        last = newest(folder)
        kept = f"the last good one is {last.name}" if last else "there is none yet"
        raise WorkError(f"checkpoint {final.name} could not be written ({error}); {kept}") from error
    return final


def load(checkpoint: Path, objects: Mapping[str, Stateful]) -> dict[str, Any]:
    """Restore the named objects from `checkpoint`; returns the plain values saved with them.

    Raises:
        WorkError: it is whole, and still not the state of these objects.
    """
    try:
        tensors = load_file(checkpoint / TENSORS)
        state = parse_json(read_bytes(checkpoint / "state.json"))
        for key, thing in objects.items():
            restored = unpack(state["objects"][key], tensors)
            if hasattr(thing, "param_groups"):
                _check_optimizer(thing, restored)
            thing.load_state_dict(restored)
        info = dict(state["info"])
        if info["images_seen"] != images_of(checkpoint):
            raise ValueError(f"images_seen is {info['images_seen']!r}")
    except UsageError:  # of what the config names, which is not the checkpoint's fault
        raise
    except Exception as error:  # of another version, or made by hand: whatever the objects make of it
        raise WorkError(
            f"checkpoint {checkpoint}: cannot be restored ({type(error).__name__}: {first_line(error)}); delete it to "
            "go on from the one before it"
        ) from error
    return info


def _check_optimizer(optimizer: Any, state: Any) -> None:
    """Raises ValueError unless a state has the settings of an optimiser and the shapes of its parameters: torch takes
    whatever it is given, and stops or goes wrong at the next update."""
    for group, found in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for name in (group.keys() & found.keys()) - {"params", "lr"}:
            if found[name] != group[name]:
                raise ValueError(f"{name} of the optimiser is {found[name]!r}, the config's is {group[name]!r}")
    shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in state["state"].items():
        if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimiser's state {place} has {', '.join(map(str, moments))}")
        if any(tuple(moments[name].shape) != shapes[place] for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError(f"the optimiser's state {place} is not of the shape {list(shapes[place])}")
        if moments["step"].numel() != 1:
            raise ValueError(f"the optimiser's state {place} has no step")


def newest(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint; older ones are not read unless it is damaged."""
    # checkpoints are large: hashing stops at the first that is whole
    for checkpoint in newest_first(folder):
        if not (damage := damage_of(checkpoint)):
            return checkpoint
        say(f"checkpoint {checkpoint.name} is damaged ({damage}): the one before it is used")
    return None


def prune(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the best, and what killed processes left half-written."""
    checkpoints = newest_first(folder)
    for checkpoint in checkpoints[keep:] if keep is not None else []:
        # the best one is kept beside the newest `keep`, however old it is
        if checkpoint.name != best:
            shutil.rmtree(checkpoint)
    # only the run's main process writes here, so a temporary folder is a killed process's
    for leftover in filter(atomic_io.is_temporary, folder.iterdir()):
        shutil.rmtree(leftover, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; a name with a suffix that is no number (a copy put aside) is ignored."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(named, key=images_of, reverse=True)


def damage_of(checkpoint: Path) -> str | None:
    """The first damage of a checkpoint's files in words, None where it is whole."""
    try:
        sums = parse_json(read_bytes(checkpoint / CHECKSUMS))
        wrong = [file for file in sorted({*FILES, *sums}) if _sha256(checkpoint / Path(file).name) != sums.get(file)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
