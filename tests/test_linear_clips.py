"""The linear code of clips: against numpy's principal components, and a Wan whose first forward is the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_codes import LINEAR, code_of, first_loss, in_pixels, pictures, train
from sentences import refused
from training_runs import run, write_config
from videos import write_video

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.linear_code import PatchMoments, from_patches, to_patches
from ldm_vae.autoencoder.linear_init import start_linear
from ldm_vae.core.errors import UsageError
from ldm_vae.models.wan import Config

SHAPES: dict[str, dict[str, Any]] = {
    "f8": {"base_dim": 24, "dim_mult": (1, 2, 3, 3), "z_dim": 16},
    "f4": {"base_dim": 48, "dim_mult": (1, 2, 2), "z_dim": 8, "temperal_downsample": (True, True)},
    "time first": {"base_dim": 24, "dim_mult": (1, 2, 4, 4), "z_dim": 8, "temperal_downsample": (True, True, False)},
}


def moving(count: int = 24, frames: int = 9, side: int = 32) -> torch.Tensor:
    """uint8 [count, 3, frames, side, side]: a window that moves over a picture by up to two pixels a frame."""
    large = pictures(count, side=side + 2 * frames)
    draw = torch.Generator().manual_seed(2)
    steps = torch.randint(0, 3, (count, 2), generator=draw).tolist()
    return torch.stack([
        torch.stack([picture[:, at * y :, at * x :][:, :side, :side] for at in range(frames)], dim=1)
        for picture, (y, x) in zip(large, steps, strict=True)
    ])  # fmt: skip


def code_of_clips(clips: torch.Tensor, factor: int, channels: int) -> Any:
    moments = PatchMoments(factor, 3, frames=4)
    moments.update(clips)
    return moments.code(channels)


def test_patches_of_clips_and_back() -> None:
    clips = torch.randn(2, 3, 9, 8, 12)
    patches = to_patches(clips, 4, 4)
    assert patches.shape == (2, 3, 2, 3, 4 * 4 * 4 * 3)
    assert torch.equal(patches[1, 2, 1, 2].view(4, 4, 4, 3), clips[1, :, 5:9, 4:8, 8:12].permute(1, 2, 3, 0))
    still = clips[1, :, :1, 4:8, 8:12].expand(-1, 4, -1, -1)
    assert torch.equal(patches[1, 0, 1, 2].view(4, 4, 4, 3), still.permute(1, 2, 3, 0))
    assert torch.equal(from_patches(patches, 4, 4), clips)


def test_the_code_of_clips_is_numpys() -> None:
    clips = moving()
    x = in_pixels(clips)
    rows = to_patches(x, 4, 4).flatten(0, 3).numpy()
    _, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    kept = vectors[:, ::-1][:, :6]
    code = code_of_clips(clips, 4, 6)
    z = code.encode(x)
    assert z.shape == (24, 6, 3, 8, 8)
    found = to_patches(code.decode(z), 4, 4).flatten(0, 3).numpy()[:, -48:]  # the last frame of each patch
    expected = rows.mean(0) + (rows - rows.mean(0)) @ kept @ kept.T
    np.testing.assert_allclose(found, expected[:, -48:], atol=1e-8)


def test_images_and_clips_of_one_frame_a_patch_have_one_code() -> None:
    images = pictures()
    moments = PatchMoments(4, 3)
    moments.update(images[:, :, None])
    code = moments.code(5)
    assert torch.equal(code.components, code_of(images, 4, 5).components)
    assert torch.equal(code.encode(in_pixels(images))[:, :, None], code.encode(in_pixels(images)[:, :, None]))


def built(shape: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return Config(num_res_blocks=1, **shape).build()


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_first_forward_is_the_code(name: str) -> None:
    shape = SHAPES[name]
    vae, clips = built(shape).eval(), moving()
    code = code_of_clips(clips, 2 ** (len(shape["dim_mult"]) - 1), shape["z_dim"])
    start_linear(vae, code)
    x = in_pixels(clips[:4])
    z = code.encode(x).float()
    moments = latents.encode(vae, x.float())
    # where two frames are joined, half of 24 or 48 channels do not hold all numbers of a patch of such pictures; f4 has
    # room for all 24 of 2 x 2 pixels
    most = 0.01 if name == "f4" else 0.05
    for frame in range(z.shape[2]):  # the first as well, which goes past the time convolutions
        wrong = moments.mean[:, :, frame] - z[:, :, frame]
        assert wrong.norm() < most * z[:, :, frame].norm()
    assert torch.allclose(moments.logvar, torch.tensor(-7.0))
    # of what the code itself loses, the decoder loses no fifth more: its signals are fewer than its pairs of channels
    linear, ours = code.decode(z), latents.decode(vae, z).double()
    for frame in range(x.shape[2]):
        error = (ours - linear)[:, :, frame].square().mean()
        lost = (linear - x)[:, :, frame].square().mean()
        assert error < max(0.2 * lost, 2e-4)


def test_every_weight_has_a_gradient() -> None:
    vae, clips = built(SHAPES["f4"]), moving(2, frames=5)
    start_linear(vae, code_of_clips(clips, 4, 8))
    train(vae, clips, 3, 1e-4)
    # a key's bias moves all of a query's scores alike
    silent = [name for name, parameter in vae.named_parameters() if not bool((parameter.grad != 0).any())]
    assert silent == []


def test_what_has_no_room_is_one_sentence() -> None:
    vae = built(SHAPES["f4"] | {"z_dim": 32})
    with refused(UsageError, "init: linear"):
        start_linear(vae, code_of_clips(moving(), 4, 32))


@pytest.mark.slow
def test_a_training_on_clips_starts_from_the_code(tmp_path: Path) -> None:
    data = tmp_path / "clips"
    data.mkdir()
    for number, clip in enumerate(moving(4)):
        pictures_of = clip.permute(1, 2, 3, 0).numpy()
        write_video(data / f"{number}.mkv", len(pictures_of), (32, 32), pictures=pictures_of)
    losses = {}
    for start in ("noise", "linear"):
        folder = tmp_path / start
        folder.mkdir()
        model = {"kind": "wan", "num_res_blocks": 1} | SHAPES["f4"]
        changes = LINEAR | {
            "init": start, "model": model, "max_train_images": 2, "train_batch_size": 1, "resolution": 32,
            "data": {"kind": "folder", "path": str(data), "frames": 5},
        }  # fmt: skip
        done = run(write_config(folder, data, **changes))
        assert done.returncode == 0, done.stderr
        losses[start] = first_loss(folder / "run")
    assert losses["linear"] < 0.75 * losses["noise"]


def test_the_shape_of_wan_2_2_cannot_start_linear(tmp_path: Path) -> None:
    changes = LINEAR | {"model": {"kind": "wan", "is_residual": True, "patch_size": 2}}
    done = run(write_config(tmp_path, tmp_path, **changes))
    assert done.returncode == 2 and "is_residual" in done.stderr and "Traceback" not in done.stderr
