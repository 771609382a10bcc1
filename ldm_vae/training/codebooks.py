"""Quantizers of a run: a VQModel's own under `model.quantizer`, and under `quantizer` one beside a network of another
class (ldm_vae/autoencoder/codebooks.py)."""

from __future__ import annotations

from typing import Any

from ldm_vae.autoencoder.codebooks import beside, put_beside
from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.core.errors import UsageError
from ldm_vae.core.rng import seeded


def check_codebooks(settings: Any) -> None:
    """Raise ValueError for a quantizer that a config has no place for."""
    model, within, kept = settings.model, getattr(settings.model, "quantizer", None), settings.quantizer
    if kept is not None:
        if within is not None or getattr(model, "regularizer", "") == "fsq":
            raise ValueError(
                f"quantizer: model.kind {model.kind} has codes of its own; expected no quantizer beside it"
            )
        if not hasattr(kept, "beside"):
            raise ValueError(
                f"quantizer.kind: {kept.kind} is for a VQModel (model.kind vq, model.quantizer); beside another class "
                "expected residual, lfq or bsq"
            )
    name, quantizer = ("model.quantizer", within) if kept is None else ("quantizer", kept)
    if settings.latent_store is not None and quantizer is not None:
        raise ValueError("latent_store: a codebook learns together with its encoder; expected another model.kind")
    terms = {part.kind for part in settings.losses.values()}
    if getattr(quantizer, "codebook", None) == "learned" and "codebook" not in terms:
        raise ValueError(f"{name}.codebook: learned needs the term losses.codebook")


def add_codebooks(settings: Any, vae: Any, base: Any = None) -> Any:
    """Put the quantizer of a config beside its network, and return the network: random weights drawn by the seed, or
    those of the network that it starts from.

    Raises:
        UsageError: that network has another quantizer, or the config none.
    """
    theirs = None if base is None else beside(base)
    ours = None
    if settings.quantizer is not None:
        # a seed of its own, so that the network's weights do not depend on it
        with seeded(settings.seed + 3):
            ours = settings.quantizer.beside(latent_channels(vae))
    if theirs is not None and (ours is None or ours.shape != theirs.shape):
        listed = ", ".join(f"{name} {value}" for name, value in theirs.shape.model_dump(exclude_defaults=True).items())
        raise UsageError(f"quantizer: expected that of init_from {settings.init_from}: {listed}")
    return put_beside(vae, ours if theirs is None else theirs)
