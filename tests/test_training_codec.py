"""The causal codec and the game of sounds in a run: terms of sounds, several heads, feature matching; loaded by name,
part by part as in whole, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sound_files import RATE
from sound_runs import sound_config
from training_runs import assert_same_run, metrics, run

from ldm_vae import decode, encode
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder

MODEL: dict[str, Any] = {
    "kind": "causal_oobleck", "audio_channels": 1, "sampling_rate": RATE, "encoder_hidden_size": 8,
    "decoder_channels": 8, "decoder_input_channels": 4, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
}  # fmt: skip
GAME: dict[str, Any] = {
    "losses": {
        "l1": {}, "kl": {"weight": 1e-4}, "multi_scale_mel": {"windows": [32, 64, 128], "bands": [5, 10, 20]},
        "multi_resolution_stft": {"sizes": [128, 64], "hops": [30, 15], "windows": [100, 50]},
    },
    "adversary": {"weight": 0.5, "loss": "least_squares", "feature_matching": 5.0, "r1_weight": 1.0, "r1_every": 2},
    "discriminator": {"kind": "waveform", "periods": [2, 3], "windows": [64], "period_width": 4, "stft_width": 4},
}  # fmt: skip


def test_a_codec_trains_against_the_heads_and_is_loaded_by_its_name(tmp_path: Path) -> None:
    config = sound_config(tmp_path, model=MODEL, max_train_images=8, log_every_images=4, **GAME)
    planned = run(config, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    done = run(config)
    assert done.returncode == 0, done.stderr
    last = metrics(tmp_path / "run")[-1]
    assert last["loss/multi_scale_mel"] > 0 and last["adversary/feature_matching"] > 0 and last["adversary/weight"] > 0
    vae = load_autoencoder(tmp_path / "run")
    geometry, x = geometry_of(vae), torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(0))
    assert type(vae).__name__ == "CausalOobleck" and (geometry.latent_channels, geometry.factor) == (4, 8)
    moments = encode(vae, x)
    posterior, _ = vae.encode_part(x)
    torch.testing.assert_close(moments.mean, posterior.mean, rtol=1e-5, atol=1e-5)
    assert decode(vae, moments.mean).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("codes", [False, True])
def test_a_game_of_several_heads_is_resumed_to_the_bit(codes: bool, tmp_path: Path) -> None:
    whole, parts, game = tmp_path / "whole", tmp_path / "parts", dict(GAME)
    game |= {"max_train_images": 16, "log_every_images": 4, "checkpoint_every_images": 8}
    if codes:  # in the place of the posterior, whose draws they leave out
        game["losses"] = {"commitment": {}, **{name: term for name, term in GAME["losses"].items() if name != "kl"}}
        game["quantizer"] = {"kind": "residual", "codebooks": 3, "codes": 16, "restart_images": 8, "dropout": 0.5}
    for folder, flags in ((whole, []), (parts, ["--max_train_images", "8"]), (parts, [])):
        folder.mkdir(exist_ok=True)
        done = run(sound_config(folder, model=MODEL, **game), *flags)
        assert done.returncode == 0, done.stderr
    assert_same_run(whole / "run", parts / "run")
