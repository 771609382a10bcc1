"""The linear code of sounds: against numpy's components, and networks whose first forward is the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderOobleck
from sentences import refused
from sound_files import RATE
from sound_runs import sound_config
from training_runs import run

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.causal_oobleck import CausalOobleck
from ldm_vae.autoencoder.codebooks import beside
from ldm_vae.autoencoder.linear_code import PatchMoments, from_patches, to_patches
from ldm_vae.autoencoder.linear_sounds import start_sounds
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError

HOP = 32
NETWORKS: dict[str, Any] = {
    "causal": lambda channels: CausalOobleck(16, (4, 2, 4), (1, 2, 4), 16, 12, channels),
    "causal, narrow": lambda channels: CausalOobleck(4, (4, 2, 4), (2, 3, 8), 8, 12, channels),
    "oobleck": lambda channels: AutoencoderOobleck(24, [4, 2, 4], [1, 2, 4], 16, 12, channels),
}


def sounds(channels: int = 1, count: int = 8) -> torch.Tensor:
    """[count, channels, 640]: noise through a filter, each channel with a share of the first."""
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(count, channels, 700, generator=draw)
    kernel = torch.hann_window(25).expand(channels, 1, 25)
    smooth = torch.nn.functional.conv1d(noise, kernel, groups=channels)[:, :, :640]
    return (smooth + smooth[:, :1]) / 20


def code_of(x: torch.Tensor, latent_channels: int = 12) -> Any:
    moments = PatchMoments(HOP, x.shape[1], axes=1)
    moments.update(x)
    return moments.code(latent_channels)


def test_hops_and_back_and_the_code_is_numpys() -> None:
    x = sounds(2)
    hops = to_patches(x, HOP)
    assert hops.shape == (8, 20, 64) and torch.equal(hops[3, 4].view(HOP, 2), x[3, :, 4 * HOP : 5 * HOP].T)
    assert torch.equal(from_patches(hops, HOP), x)
    code = code_of(x)
    rows = hops.flatten(0, 1).double().numpy()
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))  # around 0: a sound has no offset
    best = vectors[:, ::-1][:, :12]
    np.testing.assert_allclose((code.components @ code.components.T).numpy(), best @ best.T, atol=1e-9)
    np.testing.assert_allclose(code.deviations.numpy() ** 2, values[::-1][:12], rtol=1e-9)
    np.testing.assert_allclose(code.decode(code.encode(x)).numpy(), from_patches(
        torch.from_numpy(rows @ best @ best.T).view(8, 20, 64), HOP).numpy(), atol=1e-9)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_the_first_forward_is_the_code(name: str, channels: int) -> None:
    x = sounds(channels)
    code, vae = code_of(x), NETWORKS[name](channels)
    scale = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    start_sounds(vae, code, scale)
    moments = latents.encode(vae, x)
    # a narrow network leaves out the smallest components of short patches, and its noise is that of weights
    room = 0.05 if name.endswith("narrow") else 1e-3
    z = scale.view(-1, 1) * code.encode(x)
    assert float((moments.mean - z).norm() / z.norm()) < room
    y, best = latents.pixels_of(vae, moments.mean), code.decode(code.encode(x)).float()
    assert float((y - best).norm() / best.norm()) < room
    assert 0.02 < float(moments.logvar.div(2).exp().mean()) < 0.04


def test_every_weight_learns_after_the_first_steps() -> None:
    x = sounds()
    vae = NETWORKS["causal"](1)
    start_sounds(vae, code_of(x))
    optimizer = torch.optim.Adam(vae.parameters(), 1e-4)
    for _ in range(2):  # a branch that ends in zeros lets its inner layers learn from the second step on
        optimizer.zero_grad()
        posterior = vae.encode(x).latent_dist
        (vae.decode(posterior.sample()).sample - x).square().mean().backward()
        optimizer.step()
    still = [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not still


def test_a_run_starts_from_the_code_and_its_codebooks_from_k_means(tmp_path: Path) -> None:
    model = {"kind": "oobleck", "audio_channels": 1, "sampling_rate": RATE, "encoder_hidden_size": 8,
             "decoder_channels": 8, "downsampling_ratios": [2, 4],
             "channel_multiples": [1, 2]}  # fmt: skip
    config = sound_config(
        tmp_path, model=model, init="linear", init_images=16, losses={"l1": {}, "commitment": {}}, learning_rate=1e-9,
        quantizer={"kind": "residual", "codebooks": 3, "codes": 16}, max_train_images=8,
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr
    vae = load_autoencoder(tmp_path / "run")
    samples, _ = soundfile.read(sorted((tmp_path / "sounds").iterdir())[0], dtype="float32", always_2d=True)
    x = torch.from_numpy(samples.mean(axis=1))[None, None, : len(samples) // 8 * 8]
    books = beside(vae)
    assert books is not None
    with torch.no_grad():
        z = latents.encode(vae, x).mean
        indices = books.indices(z)
        left = [float((z - books.vectors(indices[:, :k])).norm() / z.norm()) for k in (1, 2, 3)]
        y = latents.pixels_of(vae, z, force_not_quantize=True)
    # random rows of 1 / 16 would leave all of it
    assert left[0] < 0.9 and left == sorted(left, reverse=True)
    assert float((y - x).norm() / x.norm()) < 0.9


def test_a_width_without_room_is_refused() -> None:
    with refused(UsageError, "model.encoder_hidden_size"):
        start_sounds(CausalOobleck(8, (4, 2, 4), (1, 1, 2), 16, 12), code_of(sounds()))
