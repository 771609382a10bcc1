"""An AutoencoderKL as a class of clips: at first, first frames are its images; what cannot be so is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sentences import refused
from tiny_classes import CLIP_KINDS, SCRATCH, clips_for, tiny
from training_runs import run, write_config
from videos import write_video

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.inflation import CLASSES, inflate
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.core.errors import UsageError
from ldm_vae.models import ltx, vidtok, wan
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.scaling import given_normalisation
from ldm_vae.training.state import build_state

SHAPE: dict[str, Any] = {"block_out_channels": (32, 32, 64), "norm_num_groups": 32, "layers_per_block": 2}
NARROW: dict[str, Any] = SHAPE | {"block_out_channels": (8, 8, 16), "norm_num_groups": 4}
# what each class can hold
BASES: dict[str, dict[str, Any]] = {
    "AutoencoderKLAllegro": NARROW,
    "AutoencoderKLMagvit": NARROW | {"mid_block_add_attention": False},
    # which has 32 groups
    "AutoencoderKLTemporalDecoder": SHAPE | {"use_post_quant_conv": False},
}
MORE: list[tuple[str, dict[str, Any]]] = [
    ("AutoencoderKLAllegro", {"mid_block_add_attention": False}),
    ("AutoencoderKLAllegro", {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 1}),
    ("AutoencoderKLAllegro", {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2}),
    ("AutoencoderKLMagvit", {"use_quant_conv": False, "use_post_quant_conv": False}),
    ("AutoencoderKLMagvit", {"block_out_channels": (4,) * 5, "norm_num_groups": 2, "layers_per_block": 3}),
    ("AutoencoderKLTemporalDecoder", {"mid_block_add_attention": False, "use_quant_conv": True}),
    ("AutoencoderKLTemporalDecoder", {"block_out_channels": (32, 32)}),
]


def image_network(**changes: Any) -> Any:
    """Random weights, biases and norms among them."""
    torch.manual_seed(0)
    vae = AutoencoderConfig(**SHAPE | changes).build().eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize(("into", "changes"), [*BASES.items(), *((name, BASES[name] | one) for name, one in MORE)])
def test_the_first_frame_is_the_image(into: str, changes: dict[str, Any]) -> None:
    base = image_network(**changes)
    vae, base = inflate(base, into).double(), base.double()
    clips = clips_for(vae, 1).double()
    with torch.no_grad():
        moments, image = latents.encode(vae, clips), latents.encode(base, clips[:, :, 0])
        torch.testing.assert_close(moments.mean[:, :, 0], image.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(moments.logvar[:, :, 0], image.logvar, rtol=1e-10, atol=1e-10)
        decoded, shown = latents.decode(vae, moments.mean), latents.decode(base, image.mean)
        torch.testing.assert_close(decoded[:, :, 0], shown, rtol=1e-9, atol=1e-10)
        # of a still every frame is; of a clip that moves those that a latent frame is of
        still = latents.decode(vae, latents.encode(vae, clips[:, :, :1].expand_as(clips)).mean)
        torch.testing.assert_close(still, shown[:, :, None].expand_as(still), rtol=1e-9, atol=1e-10)
        lengths = lengths_of(vae)
        held = range(0, clips.shape[2], lengths.step // lengths.latent_step)
        for at, frame in enumerate(held):
            one = latents.encode(base, clips[:, :, frame]).mean
            torch.testing.assert_close(moments.mean[:, :, at], one, rtol=1e-10, atol=1e-10)
        assert moments.mean.shape[2] == len(held) > 1


@pytest.mark.parametrize("into", BASES)
def test_a_run_begins_with_the_images_network_and_all_of_it_learns(into: str, tmp_path: Path) -> None:
    base = image_network(**BASES[into])
    base.save_pretrained(tmp_path / "base")
    frames = 24 if into == "AutoencoderKLAllegro" else 5
    settings = Training(
        output_dir=tmp_path, max_train_images=8, train_batch_size=1, learning_rate=1e-3, resolution=32, seed=0,
        init_from=str(tmp_path / "base"), model={"kind": "inflated", "into": into}, losses={"l1": {}, "kl": {}},
        data={"kind": "folder", "path": "none", "frames": frames},
    )  # fmt: skip
    vae = build_autoencoder(settings)
    again = build_autoencoder(settings)
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), again.parameters(), strict=True))
    state = build_state(settings, Accelerator(cpu=True), vae)
    clips = torch.rand(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        found = latents.encode(vae, clips).mean[:, :, 0]
        torch.testing.assert_close(found, latents.encode(base, clips[:, :, 0]).mean, rtol=1e-4, atol=1e-5)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    noise = torch.randn(1, *state.network.noise_shape(*clips.shape[2:]), generator=torch.Generator().manual_seed(3))
    for _ in range(3):  # layers behind a zero learn once that has moved
        state.step(clips, noise, 1, None)
    still = [key for key, value in vae.named_parameters() if value.requires_grad and torch.equal(value, before[key])]
    assert len(still) < 0.1 * len(before), still


@pytest.mark.slow
def test_a_run_of_an_inflated_network_is_exported(tmp_path: Path) -> None:
    image_network(**BASES["AutoencoderKLMagvit"]).save_pretrained(tmp_path / "base")
    (tmp_path / "clips").mkdir()
    for number in range(3):
        write_video(tmp_path / "clips" / f"{number}.mkv", 9, (32, 32))
    config = write_config(
        tmp_path, tmp_path / "clips", data={"kind": "folder", "path": str(tmp_path / "clips"), "frames": 5},
        model={"kind": "inflated", "into": "AutoencoderKLMagvit"}, init_from=str(tmp_path / "base"),
        max_train_images=4, gradient_checkpointing=True,
    )  # fmt: skip
    planned = run(config, "--dry_run")
    assert planned.returncode == 0 and "AutoencoderKLMagvit" in planned.stdout, planned.stderr
    done = run(config)
    assert done.returncode == 0, done.stderr
    trained = load_autoencoder(tmp_path / "run")
    assert type(trained).__name__ == "AutoencoderKLMagvit" and normalisation_of(trained).scaling_factor != 1.0
    # and goes on as what it is
    settings = Training(
        output_dir=tmp_path, max_train_images=8, train_batch_size=1, learning_rate=1e-3,
        init_from=str(tmp_path / "run"), model={"kind": "pretrained"}, losses={"l1": {}},
        data={"kind": "folder", "path": "none", "frames": 5},
    )  # fmt: skip
    assert torch.equal(build_autoencoder(settings).decoder.conv_in.weight, trained.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("into", "changes"),
    [
        ("AutoencoderKLAllegro", {"attention_levels": (1,)}),
        ("AutoencoderKLAllegro", {"block_out_channels": (32, 32)}),
        ("AutoencoderKLMagvit", {}),
        ("AutoencoderKLMagvit", {"mid_block_add_attention": False, "layers_per_block": 1}),
        ("AutoencoderKLTemporalDecoder", {}),
        # the class has 32 groups, whatever the image network has
        ("AutoencoderKLTemporalDecoder", {"use_post_quant_conv": False, "norm_num_groups": 16}),
    ],
)
def test_what_a_class_cannot_hold_is_refused(into: str, changes: dict[str, Any]) -> None:
    with refused(UsageError, "init_from"):
        inflate(image_network(**changes), into, "init_from BASE")


def test_what_is_no_base_of_clips_is_refused(tmp_path: Path) -> None:
    for name in ("AutoencoderKLFlux2", "AutoencoderKLWan"):
        for into in CLASSES:
            with refused(UsageError, "init_from"):
                inflate(tiny(name), into, "init_from BASE")
    image_network().save_pretrained(tmp_path / "base")
    common: dict[str, Any] = {
        "output_dir": tmp_path, "max_train_images": 8, "train_batch_size": 1, "learning_rate": 1e-3,
        "losses": {"l1": {}}, "data": {"kind": "folder", "path": "none"}, "init_from": str(tmp_path / "base"),
    }  # fmt: skip
    for kind in CLIP_KINDS:
        with refused(UsageError, "init_from"):  # says what would do
            build_autoencoder(Training(**common | {"model": SCRATCH[kind]}))
    inflated = {"model": {"kind": "inflated", "into": "AutoencoderKLAllegro"}}
    with refused(UsageError, "data.frames"):
        build_autoencoder(Training(**common | inflated | {"data": {"kind": "folder", "path": "none", "frames": 9}}))
    for wrong in ({"init_from": None}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="inflated"):
            Training(**common | inflated | wrong)


def test_a_normalisation_that_the_class_cannot_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    base = image_network(**BASES["AutoencoderKLMagvit"])
    base.register_to_config(scaling_factor=0.5, shift_factor=0.1)
    base.save_pretrained(tmp_path / "base")
    settings = Training(
        output_dir=tmp_path, max_train_images=8, train_batch_size=1, learning_rate=1e-3, losses={"l1": {}},
        init_from=str(tmp_path / "base"), model={"kind": "inflated", "into": "AutoencoderKLMagvit"},
        trainable=("decoder.*", "post_quant_conv.*"), data={"kind": "folder", "path": "none", "frames": 5},
    )  # fmt: skip
    vae = build_autoencoder(settings)
    with refused(UsageError, "init_from"):
        given_normalisation(settings, vae)
    assert given_normalisation(settings.model_copy(update={"normalisation": "scale"}), vae) is None


# --- the same class, first of images and then of clips ----------------------------------------------------------------


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_images_first_and_clips_after(kind: str, tmp_path: Path) -> None:
    """Weights that learned images are where a run of clips begins; layers for later frames wait, and then learn."""
    common: dict[str, Any] = {
        "output_dir": tmp_path, "max_train_images": 8, "train_batch_size": 1, "learning_rate": 1e-3,
        "model": SCRATCH[kind], "losses": {"l1": {}, "kl": {}},
    }  # fmt: skip
    stills = Training(**common, data={"kind": "folder", "path": "none", "frames": 1})
    first = build_autoencoder(stills)
    state = build_state(stills, Accelerator(cpu=True), first)
    image = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.zeros(1, *state.network.noise_shape(1, 32, 32))
    state.step(image, noise, 0, None)
    waiting = {name for name, one in first.named_parameters() if not one.requires_grad}
    assert kind == "vidtok" or waiting == {name for name in waiting if "time_conv" in name} or kind == "ltx"
    first.save_pretrained(tmp_path / "stills")
    clips = Training(**common, data={"kind": "folder", "path": "none", "frames": 9}, init_from=str(tmp_path / "stills"))
    vae = build_autoencoder(clips)
    assert all(one.requires_grad for one in vae.parameters())
    for key, value in first.state_dict().items():
        assert torch.equal(vae.state_dict()[key], value), key
    clip = torch.cat([image, torch.rand(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1], 2)
    with torch.no_grad():
        moments, expected = latents.encode(vae.eval(), clip), latents.encode(first.eval(), image)
        torch.testing.assert_close(moments.mean[:, :, :1], expected.mean, rtol=1e-4, atol=1e-5)
        if kind != "ltx":  # whose decoder sees later frames
            shown = latents.decode(vae, moments.mean)[:, :, :1]
            torch.testing.assert_close(shown, latents.decode(first, expected.mean), rtol=1e-4, atol=1e-5)


# --- shapes of the kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "module"), [("wan", wan), ("ltx", ltx), ("vidtok", vidtok)])
def test_the_default_is_the_published_shape(kind: str, module: Any) -> None:
    chosen = module.Config()
    with torch.device("meta"):
        network = chosen.build()
        published = type(network)()
    assert {name: one.shape for name, one in network.state_dict().items()} == {
        name: one.shape for name, one in published.state_dict().items()
    }
    known = {name: one.default for name, one in inspect.signature(type(network).__init__).parameters.items()}
    for name, value in chosen.shape().items():
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(known[name]) if isinstance(known[name], tuple) else known[name]
        ), name


def test_wan_2_2s_shape_is_in_reach() -> None:
    chosen = wan.Config(z_dim=48, base_dim=160, decoder_base_dim=256, is_residual=True, patch_size=2)
    with torch.device("meta"):
        network = chosen.build()
    assert network.config.in_channels == network.config.out_channels == 12 and network.spatial_compression_ratio == 16
    assert sum(one.numel() for one in network.parameters()) == 704_688_668  # of Wan-AI/Wan2.2-TI2V-5B


@pytest.mark.parametrize("changes", [{"is_residual": True, "dim_mult": [1, 2, 1]}, {"patch_size": 2},
                                     {"is_residual": True, "dim_mult": [2, 4, 4], "decoder_base_dim": 4,
                                      "patch_size": 2}])  # fmt: skip
def test_shapes_of_wan_encode_and_decode(changes: dict[str, Any]) -> None:
    vae = wan.Config(**{key: one for key, one in (SCRATCH["wan"] | changes).items() if key != "kind"}).build().eval()
    clips = clips_for(vae, 1)
    with torch.no_grad():
        moments = latents.encode(vae, clips)
        assert latents.decode(vae, moments.mean).shape == clips.shape
    side = 32 // (4 * (changes.get("patch_size") or 1))
    assert moments.mean.shape == (1, 4, 3, side, side)
