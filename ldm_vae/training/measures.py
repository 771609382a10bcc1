"""Metrics of a validation in a training config: those that its signal has."""

from __future__ import annotations

from typing import Any

from ldm_vae.metrics.titles import OF_SOUNDS, USUAL


def usual_metrics(tree: Any) -> Any:
    """A config as it was written, with the usual metrics of sounds where it reads sounds and names none."""
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, dict) or data.get("sample_rate") is None:
        return tree
    return {"validation_metrics": [*USUAL["audio"]], "best_metric": "mel_distance"} | tree


def check_metrics(settings: Any) -> None:
    """Raise ValueError for metrics that are of another signal, and a best one that is none of them; `settings`: of
    `config.Training`."""
    named, sounds = settings.validation_metrics, getattr(settings.data, "sample_rate", None) is not None
    if settings.best_metric not in named:
        raise ValueError(f"best_metric: expected one of validation_metrics, got {settings.best_metric}")
    if wrong := [name for name in named if (name in OF_SOUNDS) != sounds]:
        expected = f"is of images; of sounds there are {', '.join(OF_SOUNDS)}" if sounds else "is of sounds"
        raise ValueError(f"validation_metrics: {wrong[0]} {expected}")
    if not settings.alpha and (wrong := [name for name in named if name.startswith("alpha_")]):
        raise ValueError(f"validation_metrics: {wrong[0]} is of images with alpha; expected data.alpha: true")
    of_clips = {"temporal_l1", "flicker"} & {*named}
    if of_clips and getattr(settings.validation_data or settings.data, "frames", None) is None:
        raise ValueError(f"validation_metrics: {min(of_clips)} is of clips; expected validation_data.frames")
