"""Configs of short trainings on sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sound_files import RATE, write_sounds
from training_runs import write_config

MODEL: dict[str, Any] = {
    "kind": "oobleck", "audio_channels": 1, "sampling_rate": RATE, "encoder_hidden_size": 8, "decoder_channels": 8,
    "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
}  # fmt: skip
TERMS: dict[str, Any] = {"l1": {}, "l2": {}, "kl": {"weight": 1e-4}}


def sound_config(tmp_path: Path, **changes: Any) -> Path:
    data = {"kind": "folder", "path": str(write_sounds(tmp_path / "sounds", 4)), "channels": 1, "sample_rate": RATE,
            "samples": 256} | changes.pop("data", {})  # fmt: skip
    plain = {"model": MODEL, "losses": TERMS, "adversary": {"weight": 0.0}, "discriminator": None, "data": data,
             "learning_rate": 1e-3, "normalisation_images": 8, "max_train_images": 64}  # fmt: skip
    path = write_config(tmp_path, tmp_path, **plain | changes)
    text = path.read_text()
    path.write_text("".join(line for line in text.splitlines(True) if not line.startswith("resolution:")))
    return path
