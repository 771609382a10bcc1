"""Recipe of a VAE for the model card, from its run folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ldm_vae.autoencoder.weights.checkpoint import is_checkpoint
from ldm_vae.core.config_file import read_yaml
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes, read_text
from ldm_vae.core.validation import as_written, first_line, parse_json
from ldm_vae.metrics.result import markdown
from ldm_vae.run.checkpoint import PREFIX
from ldm_vae.run.log_file import read_log

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Recipe:
    """Recipe for a card. metadata: keys of the card's head; sections: title => Markdown; results: what evaluation
    measured."""

    metadata: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)


def read_recipe(run: Path) -> Recipe:
    """Read a recipe from RUN/config.yaml, metrics.jsonl and report/metrics.json; of a checkpoint from its config and
    the log up to it, since the report measured later weights. Empty for a folder that is no run."""
    path = run / "config.yaml"
    if not path.is_file():
        return Recipe()
    config = read_yaml(path)
    log = read_log(run / "metrics.jsonl")
    if is_checkpoint(run):
        seen = run.resolve().name.removeprefix(PREFIX)  # a copy may have another name
        whole = read_log(run.resolve().parents[1] / "metrics.jsonl")
        log = [line for line in whole if seen.isdecimal() and line["images"] <= int(seen)]
    measured = run / "report" / "metrics.json"
    found = _json(measured)
    results = found if isinstance(found, list) else [found] if found else []
    with as_written(measured):
        if results:
            markdown(results)  # the card's table: said here of this file, not after the weights are written
    with as_written(path):
        return Recipe(
            metadata=_metadata(config),
            sections={"Training": _training(config, log)},
            results=results,
        )


def base_license(base: str) -> str | None:
    """The licence that the card of a local base names; None when there is none to read."""
    card, tree = Path(base) / "README.md", None
    # a card of anybody; without a licence that can be read, ours names none either
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        head = read_text(card).split("---") if card.is_file() else []
        tree = yaml.safe_load(head[1]) if len(head) > 2 else None
    found = tree.get("license") if isinstance(tree, dict) else None
    return found if isinstance(found, str) else None


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Only what is true on a hub: a path of somebody's disk says nothing there."""
    found: dict[str, Any] = {}
    base, data = config.get("init_from"), (config.get("data") or {}).get("path")
    if isinstance(base, str):
        if _is_hub_id(base):
            found["base_model"] = base
        license_name = base_license(base)
        if license_name is not None:
            found["license"] = license_name
    if isinstance(data, str) and _is_hub_id(data):
        found["datasets"] = [data]
    return found


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _is_local(base: Any) -> bool:
    return isinstance(base, str) and not _is_hub_id(base)


def _training(config: Mapping[str, Any], log: list[dict[str, Any]]) -> str:
    lines = []
    if log:
        seen = f"{max(row['images'] for row in log):,} images seen"
        processes = log[0].get("num_processes")
        lines.append(f"- {seen}" + (f" by {processes} process(es)" if processes else ""))
        if "seconds" in log[-1]:
            lines.append(f"- cost: {_hours(float(log[-1]['seconds']), processes or 1)}")
    for key in ("resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "mixed_precision"):
        if key in config:
            lines.append(f"- {key}: {config[key]}")
    terms = {name: (term or {}).get("weight") for name, term in (config.get("losses") or {}).items()}
    lines.append("- losses: " + ", ".join(f"{name} {weight}" for name, weight in terms.items()))
    adversary = config.get("adversary") or {}
    if adversary.get("weight"):
        lines.append(f"- adversary: weight {adversary['weight']}, from {adversary.get('start_images', 0):,} images on")
    # paths of somebody's disk are nobody else's business
    private = {"output_dir", "data", "validation_data"} | (
        {"init_from"} if _is_local(config.get("init_from")) else set()
    )
    public = {key: value for key, value in config.items() if key not in private}
    text = yaml.safe_dump(public, sort_keys=False)
    return "\n".join(lines) + f"\n\n<details><summary>the whole config</summary>\n\n```yaml\n{text}```\n\n</details>"


def _hours(seconds: float, processes: int) -> str:
    hours = seconds / 3600
    return f"{hours:.2g} hours" + (f", {hours * processes:.2g} process-hours" if processes > 1 else "")


def _json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path)) if path.is_file() else None
    except ValueError as error:
        raise UsageError(f"{path}: not readable as JSON: {first_line(error)}") from error
