"""One export from end to end: load, decide the normalisation, write, read back, compare, and say what was done."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import AutoencoderKL

from ldm_vae.autoencoder import load_autoencoder
from ldm_vae.errors import UsageError
from ldm_vae.export import publish
from ldm_vae.export.card import model_card
from ldm_vae.export.diffusers_folder import STATISTICS, configured_copy, read_statistics, write_vae
from ldm_vae.export.measure import statistics_of
from ldm_vae.export.single_file import SD_SCALING, is_sd_shape, load_single_file
from ldm_vae.export.targets import TARGETS, warnings_for, write_target
from ldm_vae.latent_store.statistics import LatentStatistics
from ldm_vae.latents import Normalisation, NormalisationKind


@dataclass(frozen=True)
class Request:
    """What `ldm-vae export` was asked for; the fields are its flags."""

    source: str
    out: Path
    target: str = "diffusers"
    config: str | None = None
    stats: str | None = None
    normalisation: NormalisationKind | None = None
    resolution: int | None = None
    batch_size: int = 8
    stats_images: int | None = None
    allow_pickle: bool = False


@dataclass
class Done:
    """What was written, line by line, and what the user must know."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export(request: Request) -> Done:
    """Do it. Raises UsageError for a wrong request, WorkError when what was written does not read back."""
    done = Done()
    vae = _load(request)
    statistics = _statistics(request, vae)
    normalisation = _normalisation(request, vae, statistics, done)
    if request.target == "diffusers":
        write_vae(vae, request.out, normalisation, sample_size=request.resolution, statistics=statistics)
        done.lines.append(f"wrote {request.out} (diffusers), read back: weights equal to the bit, decode equal")
        load = f'AutoencoderKL.from_pretrained("{request.out}")'
    else:
        ready = configured_copy(vae, normalisation, sample_size=request.resolution)
        path = _write_file(ready, request, statistics, done)
        load = f'ldm_vae.load_autoencoder("{path}")'
    done.lines += [_describe(normalisation, statistics), f"load it: {load}"]
    return done


def _load(request: Request) -> AutoencoderKL:
    if Path(request.source).is_file() and request.allow_pickle:
        config = None if request.config is None else Path(request.config)
        return load_single_file(Path(request.source), config, allow_pickle=True).float()
    return load_autoencoder(request.source, request.config)


# --- the normalisation ------------------------------------------------------------------------------------------------


def _statistics(request: Request, vae: AutoencoderKL) -> LatentStatistics | None:
    """Measured now if asked; else as they were measured when SRC was written."""
    if request.stats is not None:
        return statistics_of(
            vae, request.stats, request.resolution, batch_size=request.batch_size, limit=request.stats_images
        )
    source = Path(request.source)
    places = [place for place in (source / STATISTICS, source / "vae" / STATISTICS) if place.is_file()]
    return read_statistics(places[0]) if places else None


def _normalisation(
    request: Request, vae: AutoencoderKL, statistics: LatentStatistics | None, done: Done
) -> Normalisation:
    """The one that is written: measured in this call, or SRC's own, or another kind from SRC's statistics."""
    try:
        own = Normalisation.from_config(vae.config)
    except ValueError as error:
        if request.stats is None:
            raise UsageError(f"SRC {request.source}: names two normalisations ({error}); give --stats") from error
        own = Normalisation(1.0)
    kind = request.normalisation or own.kind
    if statistics is not None and (request.stats is not None or kind != own.kind):
        return statistics.normalisation(kind)
    if kind != own.kind:
        raise UsageError(
            f"--normalisation {kind}: {request.source} names `{own.kind}` only; give --stats to measure it"
        )
    if own == Normalisation(SD_SCALING) and not is_sd_shape(vae.config):
        raise UsageError(
            f"SRC {request.source}: its scaling_factor {SD_SCALING} is diffusers' default and Stable Diffusion's, and "
            "this is another VAE; give --stats STORE or --stats DATA to measure it"
        )
    if own == Normalisation(1.0):
        done.warnings.append("scaling_factor is 1, not measured: give --stats STORE or --stats DATA")
    return own


def _describe(normalisation: Normalisation, statistics: LatentStatistics | None) -> str:
    values = {key: value for key, value in normalisation.to_config().items() if value is not None}
    intervals = statistics.intervals if statistics is not None else None
    parts = []
    for key, value in values.items():
        if isinstance(value, float) and not (normalisation.kind == "channel" and key == "scaling_factor"):
            low, high = (intervals or {}).get(key, (None, None))
            measured = "" if low is None else f" (95 % interval {low:.5g} to {high:.5g})"
            parts.append(f"{key} {value:.5g}{measured}")
        elif not isinstance(value, float):
            parts.append(f"{key} [{', '.join(f'{item:.4g}' for item in value)}]")
    over = f", measured over {statistics.images:,} images" if statistics is not None else ", as SRC has it"
    return f"normalisation `{normalisation.kind}`: {', '.join(parts)}{over}"


# --- single files -----------------------------------------------------------------------------------------------------


def _write_file(vae: AutoencoderKL, request: Request, statistics: LatentStatistics | None, done: Done) -> Path:
    """OUT.safetensors with its card beside it, or a folder that holds both."""
    target = TARGETS[request.target]
    done.warnings += warnings_for(target, vae.config)
    alone = request.out.suffix == ".safetensors"
    name = request.out.stem if alone else request.out.name
    sections = {f"For {target.title}": _for_target(done.warnings)}
    card = model_card(vae, name=name, statistics=statistics, sections=sections)
    if alone:
        if request.out.is_dir():
            raise UsageError(f"OUT {request.out}: expected a file to write, found a folder")
        path = request.out
        difference = write_target(vae, path)
        path.with_suffix(".md").write_text(card, encoding="utf-8")
    else:
        publish.check_replaceable(request.out)
        folder = publish.beside(request.out)
        try:
            difference = write_target(vae, folder / f"{name}.safetensors")
            (folder / "README.md").write_text(card, encoding="utf-8")
            publish.put(folder, request.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        path = request.out / f"{name}.safetensors"
    done.lines.append(f"wrote {path} ({target.title}), read by LDM's names: decode differs by {difference:.1g} at most")
    return path


def _for_target(warnings: list[str]) -> str:
    return "\n".join(f"- {warning}" for warning in warnings) or "Loads as it is; nothing in it is ignored."
