"""The normalisation that an export writes: the one that diffusion models know stays, unless another is asked for by
name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import has_place, is_fixed, law_of, own_normalisation
from ldm_vae.autoencoder.single_file import SD_SCALING, is_sd_shape
from ldm_vae.autoencoder.weights.checkpoint import is_checkpoint
from ldm_vae.core import intervals
from ldm_vae.core.config_file import read_yaml
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.text import an
from ldm_vae.export.diffusers_folder import STATISTICS, read_statistics
from ldm_vae.export.measurement import base_normalisation
from ldm_vae.export.request import Request
from ldm_vae.latent_store.format.statistics import LatentStatistics


@dataclass(frozen=True)
class Choice:
    """The normalisation to write; lines that say whose it is, and what is measured; what it breaks (for the card too),
    and a warning, or None."""

    normalisation: Normalisation | None
    lines: list[str]
    incompatible: str | None = None
    warning: str | None = None


def statistics_beside(source: str) -> LatentStatistics | None:
    """Statistics that were measured when SRC was written; None where nothing was."""
    places = (Path(source) / STATISTICS, Path(source) / "vae" / STATISTICS)
    return next((read_statistics(place) for place in places if place.is_file()), None)


def choose(request: Request, vae: AutoencoderKL, measured: LatentStatistics | None) -> Choice:
    """The normalisation to write.

    1. `--normalisation_from BASE`: BASE's.
    2. `--normalisation KIND` of another kind than SRC's, or with `--stats`: measured.
    3. SRC's, where it was given rather than measured when SRC was written (a base's, a teacher's, edited by hand).
    4. With `--stats`: measured, of SRC's kind. Without: SRC's.

    Args:
        measured: statistics of this call's --stats, else those beside SRC.

    Raises:
        UsageError: nothing is measured for the kind that is asked for, or SRC names none that holds.
    """
    if request.normalisation_from is not None:
        base = base_normalisation(request.normalisation_from, latent_channels(vae))
        return Choice(base, _lines(base, f"as {request.normalisation_from} has it", measured))
    try:
        own = own_normalisation(vae, f"SRC {request.source}")
    except UsageError:
        if measured is None or request.stats is None:
            raise
        # SRC's config names none that holds; with --stats that does not matter
        found = measured.normalisation(request.normalisation or "scale")
        return Choice(found, _lines(found, "", measured))
    if own is None and not has_place(vae):
        return Choice(None, [f"normalisation: none, as {an(type(vae).__name__)} has no place for one"])
    if own is None:
        if measured is None:
            raise UsageError(f"SRC {request.source}: its config names no normalisation; give --stats to measure one")
        found = measured.normalisation(request.normalisation or "scale")
        return Choice(found, _lines(found, "", measured))
    # of a checkpoint, whose law is what its run gives it: what is measured now is what would lie beside it
    beside = measured if is_checkpoint(request.source) else statistics_beside(request.source)
    kind = request.normalisation or own.kind
    # a distilled network's latents are its teacher's, normalised already
    given = is_fixed(vae) or (beside is not None and not beside.gives(own))
    by_name = request.normalisation is not None and (request.stats is not None or kind != own.kind)
    if by_name or (request.stats is not None and not given):
        if measured is None:
            raise UsageError(
                f"--normalisation {kind}: {request.source} names `{own.kind}` only; give --stats to measure it"
            )
        found = measured.normalisation(kind)
        known = given or (beside is None and not is_default(own, vae))
        return Choice(found, _lines(found, "", measured), _broken(request, own) if known and found != own else None)
    # a config that was never set has this default, which would pass unseen and be wrong
    if own == Normalisation(SD_SCALING) and is_default(own, vae) and not given:
        raise UsageError(
            f"SRC {request.source}: its scaling_factor {SD_SCALING} is diffusers' default and Stable Diffusion's, and "
            "this is another VAE; give --stats STORE or --stats DATA to measure it"
        )
    warning = None
    if _is_identity(own, vae) and not given:
        what = "scaling_factor is 1" if own.kind == "scale" else "the batch norm is an identity"
        warning = f"{what}, not measured: give --stats STORE or --stats DATA"
    whose = "as SRC has it"
    if given and request.stats is not None:
        whose += (
            f"; diffusion models of {_base(request.source)} need it: `--normalisation {kind}` writes what is measured"
        )
    return Choice(own, _lines(own, whose, measured), warning=warning)


def is_default(own: Normalisation, vae: AutoencoderKL) -> bool:
    """True for what stands in a config whose scaling nobody has set."""
    return _is_identity(own, vae) or (own == Normalisation(SD_SCALING) and not is_sd_shape(vae.config))


def _is_identity(own: Normalisation, vae: Any) -> bool:
    fresh = law_of(vae) == "batch_norm" and not vae.bn.running_mean.any() and bool((vae.bn.running_var == 1.0).all())
    return fresh or own == Normalisation(1.0)


def _base(source: str) -> str:
    """The VAE that SRC's normalisation is of, as the run's config says."""
    path = Path(source) / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    return str(config.get("normalisation_from") or config.get("init_from") or "its base")


def _broken(request: Request, own: Normalisation) -> str:
    base = _base(request.source)
    whose = request.source if base == "its base" else base
    return (
        f"incompatible with diffusion models that know SRC's normalisation, {_numbers(own)}; "
        f"`--normalisation_from {whose}` keeps it"
    )


# --- words ------------------------------------------------------------------------------------------------------------


def _lines(written: Normalisation, whose: str, measured: LatentStatistics | None) -> list[str]:
    """Sentences on what is written, with an interval only where that was measured; and on what was measured and is not
    written."""
    if measured is not None and measured.gives(written):
        over = ", ".join(part for part in (whose, _over(measured)) if part)
        return [f"normalisation `{written.kind}`: {_numbers(written, measured.intervals)}, {over}"]
    line = f"normalisation `{written.kind}`: {_numbers(written)}, {whose}"
    if measured is None:
        return [line]
    try:
        values = _numbers(measured.normalisation(written.kind), measured.intervals)
    except WorkError as error:  # latents that do not vary
        values = str(error)
    return [line, f"not written, for comparison: {values}, {_over(measured)}"]


def _over(measured: LatentStatistics) -> str:
    why = "" if measured.intervals is not None else f" ({intervals.why_none(measured.images)})"
    return f"measured over {measured.images:,} images{why}"


def _numbers(normalisation: Normalisation, known: Mapping[str, Any] | None = None) -> str:
    parts = []
    for key, value in normalisation.to_config().items():
        if isinstance(value, list):
            parts.append(f"{key} [{', '.join(f'{item:.4g}' for item in value)}]")
        elif value is not None and normalisation.kind == "channel":
            parts.append(f"{key} {value:g}")
        elif value is not None:
            low, high = (known or {}).get(key, (None, None))
            parts.append(f"{key} {value:.5g}" + ("" if low is None else f" (95 % interval {low:.5g} to {high:.5g})"))
    return ", ".join(parts)
