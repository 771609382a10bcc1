"""Contents of the page: everything that a run or an evaluation left in its folder, read and nothing computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_vae.core.config_file import read_yaml
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import LARGEST, read_bytes, read_text
from ldm_vae.core.paths import nearest_path
from ldm_vae.core.validation import as_written, parse_json
from ldm_vae.run.log_file import read_log

Json = dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """Each field is empty where the folder has no such thing.

    home: the folder of index.html; log: the lines of metrics.jsonl; results: metrics.json as a list; pictures:
    pictures.json; statistics: of the latent store; config: of the run, and as it was written; samples: PNG files;
    diffusion, prior: what train.diffusion and train.prior recorded; diffusability: of the probe; latent_space: of
    eval.latent_space; folder: what was asked for.
    """

    name: str
    home: Path
    folder: Path
    log: list[Json] = field(default_factory=list)
    results: list[Json] = field(default_factory=list)
    pictures: list[Json] = field(default_factory=list)
    statistics: Json | None = None
    config: Json = field(default_factory=dict)
    config_text: str = ""
    samples: list[Path] = field(default_factory=list)
    diffusion: Json | None = None
    prior: Json | None = None
    diffusability: Json | None = None
    latent_space: Json | None = None


def read_contents(folder: Path) -> Contents:
    """A run folder (its page goes to RUN/report) or the output of an evaluation (its page goes there).

    Raises:
        UsageError: it is neither.
        WorkError: a file in it cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(
            f"report {folder}: no such folder; expected a run or the output of an evaluation{nearest_path(folder)}"
        )
    if folder.name == "report" and _is_run(folder.parent):
        folder = folder.parent
    is_run = _is_run(folder)
    home = folder / "report" if is_run else folder
    evaluations = ("metrics.json", "diffusability.json", "latent_space.json")
    if not is_run and not any((home / name).is_file() for name in evaluations):
        raise UsageError(
            f"report {folder}: expected a run (config.yaml, metrics.jsonl) or an evaluation (metrics.json); found none"
        )
    found = _json(home / "metrics.json") if (home / "metrics.json").is_file() else []
    pictures = home / "pictures" / "pictures.json"
    manifest = folder / "latents" / "manifest.json"
    config = read_yaml(folder / "config.yaml") if is_run and (folder / "config.yaml").is_file() else {}
    with as_written(manifest):
        statistics = _json(manifest).get("statistics") if manifest.is_file() else None
    return Contents(
        name=folder.resolve().name,
        home=home,
        folder=folder,
        log=read_log(folder / "metrics.jsonl") if is_run else [],
        results=found if isinstance(found, list) else [found],
        pictures=_json(pictures) if pictures.is_file() else [],
        statistics=statistics,
        config=config,
        config_text=read_text(folder / "config.yaml") if config else "",
        samples=sorted(path for path in (home / "samples").glob("*.png") if not path.is_symlink()),
        diffusion=_json_or_none(home / "diffusion.json"),
        prior=_json_or_none(home / "prior.json"),
        diffusability=_json_or_none(home / "diffusability.json"),
        latent_space=_json_or_none(home / "latent_space.json"),
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def _json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path, LARGEST))
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: not readable as JSON: {error}") from error


def _json_or_none(path: Path) -> Any:
    return _json(path) if path.is_file() else None
