"""Networks that configs of `model.kind: pretrained` start from, without a hub: of their published shape, or tiny."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import autoencoders
from tiny_classes import tiny

from eval.speed import rae
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.models import dc
from ldm_vae.training import config, dry_run
from ldm_vae.training.config import Training

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "black-forest-labs/FLUX.2-dev": ("AutoencoderKLFlux2", {}),
    "Qwen/Qwen-Image": ("AutoencoderKLQwenImage", {}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("AutoencoderKLWan", {}),
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers": ("AutoencoderDC", dc.Config().shape()),
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08": ("AutoencoderRAE", rae.PUBLISHED),
}


def build_outline(settings: Training) -> Any:
    """The network of a config without values, that of init_from where no model builds it."""
    with torch.device("meta"):
        if settings.model.kind != "pretrained":
            return settings.model.build()
        name, shape = BASES[str(settings.init_from)]
        return getattr(autoencoders, name)(**shape)


def stand_in(settings: Training, monkeypatch: pytest.MonkeyPatch) -> Training:
    """The config with a tiny base of the same class, at a size that this takes; others as they are."""
    if settings.model.kind != "pretrained":
        return settings
    base = tiny(BASES[str(settings.init_from)][0])
    for module in (config, dry_run):
        monkeypatch.setattr(module, "load_autoencoder", lambda source: base)
    changes: dict[str, Any] = {"resolution": geometry_of(base).side or 64}
    if settings.discriminator is not None and settings.discriminator.kind == "features":
        changes["discriminator"] = settings.discriminator.model_copy(update={"resolution": 32})
    return settings.model_copy(update=changes)


def shallow(settings: Training) -> Training:
    """The same config with one layer a resolution, wherever a kind has a number of them, one micro-batch, and of clips
    two of a class's chunks of time: more of them do the same again."""
    fewer: dict[str, Any] = {}
    for name, value in settings.model:
        if name.endswith(("layers_per_block", "num_res_blocks")):
            fewer[name] = 1 if isinstance(value, int) else (1,) * len(value)
    changes: dict[str, Any] = {"model": settings.model.model_copy(update=fewer), "gradient_accumulation_steps": 1}
    if (getattr(settings.data, "frames", None) or 0) > 5:
        changes["data"] = settings.data.model_copy(update={"frames": 5})
    return settings.model_copy(update=changes)
