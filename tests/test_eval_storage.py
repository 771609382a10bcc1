"""`eval.storage`: every form is measured, and what it says of 8 bits is so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from store_sources import Pictures
from stores import SETTINGS

from eval import storage
from ldm_vae.latent_store import write_store


def test_every_form_is_measured(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tiny_vae, Pictures(9), tmp_path / "s", **SETTINGS, dtype="fp32", pixels=True)
    call = [
        "eval.storage",
        tiny_vae_folder,
        tmp_path / "s",
        "--output",
        tmp_path / "out",
        "--images",
        32,
        "--rounds",
        1,
    ]
    monkeypatch.setattr(sys, "argv", [str(word) for word in call])
    storage.main()
    results = json.loads((tmp_path / "out" / "storage.json").read_text())["results"]
    found = {result["form"]: result for result in results}
    assert found.keys() == {*storage.FORMS, "fp32 moments, another seed"}
    assert found["fp32 moments"]["mean_error_in_std"] == 0
    assert 0 < found["fp16 moments"]["mean_error_in_std"] < found["bf16 moments"]["mean_error_in_std"] < 1e-2
    assert found["fp32 moments"]["flow_loss"] != found["fp32 moments, another seed"]["flow_loss"]
    assert found["fp32 moments"]["flow_loss"] == pytest.approx(found["fp16 moments"]["flow_loss"], abs=1e-3)


def test_8_bits_of_a_logvar_are_half_a_step_off_at_most() -> None:
    logvar = torch.linspace(-30, 20, 1001)
    assert float((storage.in_8_bits(logvar) - logvar).abs().max()) <= 25 / storage.LEVELS + 1e-5
