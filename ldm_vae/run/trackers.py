"""Trackers (`report_to`) of Accelerate: a missing one is an error, and pictures go to those that take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import not_among


def check_tracker(name: str | None) -> None:
    """Raises UsageError unless the tracker is one of Accelerate's and its package is installed; Accelerate itself goes
    on without it."""
    known, here = sorted(map(str, LOGGER_TYPE_TO_CLASS)), sorted(map(str, get_available_trackers()))
    if name is not None and name not in known:
        raise UsageError(f"report_to: {not_among(name, known)}")
    if name is not None and name not in here:
        raise UsageError(
            f"report_to: {name} is not installed here (pip install {name}); there is {', '.join(here) or 'none'}"
        )


def start_tracker(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Open the tracker that the Accelerator was built with; settings are dotted keys with plain values."""
    # hyperparameters may be numbers, strings and booleans
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
    accelerator.init_trackers("ldm-vae", config=plain)


def log_picture(accelerator: Accelerator, name: str, picture: Path, images_seen: int) -> None:
    """Show a PNG file in every tracker that takes pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            # tensorboard takes a batch [N, H, W, C] and has to be told so
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(Image.open(picture))[None]}, step=images_seen, **options)
