"""Every class of images is fine-tuned with the full objective (`model.kind: pretrained`), or trained from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models import autoencoders
from images import write_images
from pydantic import ValidationError
from sentences import refused
from tiny_classes import SCRATCH, TRAINED, pixels_for, tiny
from training_runs import TINY, run, write_config

from ldm_vae.autoencoder.fine_tuning import idle_parameters, is_encoders
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.core.errors import UsageError
from ldm_vae.export.normalisation import is_default
from ldm_vae.models.asymmetric import Config as AsymmetricConfig
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.state import build_state

OBJECTIVE = {
    "losses": {"l1": {}}, "adversary": {"weight": 0.5}, "discriminator": {"kind": "patchgan", "width": 8, "layers": 1},
}  # fmt: skip
DECODER = ("decoder.*", "post_quant_conv.*")


def settings_for(vae: Any, folder: Path, **changes: Any) -> Training:
    vae.save_pretrained(folder / "base")
    channels = geometry_of(vae).in_channels
    given: dict[str, Any] = {
        "output_dir": folder / "run", "max_train_images": 8, "train_batch_size": 2, "learning_rate": 1e-3,
        "resolution": geometry_of(vae).side or 32, "init_from": str(folder / "base"),
        "model": {"kind": "pretrained", "in_channels": channels},
        "data": {"kind": "folder", "path": "none", "channels": channels, "alpha": has_alpha(vae)},
    }  # fmt: skip
    return Training(**given | OBJECTIVE | changes)


# the decoder alone of each class: of those that are trained from scratch most are among TRAINED
STEPS = [(name, trainable) for name in TRAINED for trainable in (("*",), DECODER)]
STEPS += [(name, trainable) for name in SCRATCH for trainable in (("*",), ("*", "!decoder.*"))]
STEPS += [(name, DECODER) for name in ("ltx", "vidtok")]


@pytest.mark.parametrize(("name", "trainable"), STEPS)
def test_a_step_moves_what_has_a_part_and_nothing_else(name: str, trainable: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny("AutoencoderKL" if name in SCRATCH else name)
    scratch = {"model": SCRATCH[name], "init_from": None} if name in SCRATCH else {}
    settings = settings_for(base, tmp_path, **scratch)
    base = settings.model.build() if scratch else base
    names = [pattern for pattern in trainable if pattern != "post_quant_conv.*" or hasattr(base, "post_quant_conv")]
    vae = build_autoencoder(settings.model_copy(update={"trainable": tuple(names)}))
    state = build_state(settings, Accelerator(cpu=True), vae)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    pixels = pixels_for(vae)
    if geometry_of(vae).side is None and geometry_of(vae).factor <= 8:
        pixels = pixels[..., :16, :16]
    noise = torch.randn(2, *state.network.noise_shape(*pixels.shape[2:]), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        logs = state.step(pixels, noise, 2, None)
    assert torch.isfinite(logs["adversary/weight"]) and logs["adversary/weight"] > 0
    idle = {*idle_parameters(vae)}
    assert not any(vae.get_parameter(key).requires_grad for key in idle)
    expected = {key for key, _ in vae.named_parameters() if key not in idle}
    if trainable != ("*",):
        expected = {
            key for key in expected if not (is_encoders(key) if trainable == DECODER else key[:8] == "decoder.")
        }
    moved = {key for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= expected and (name != "asymmetric" or any(".condition_encoder." in key for key in idle))
    # a bias before a norm of single channels moves by rounding or not at all
    assert len(moved) > 0.9 * len(expected)


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderKLWan", "AutoencoderRAE"])
@pytest.mark.slow
def test_the_decoder_of_a_run_is_exported_with_the_bases_law(name: str, tmp_path: Path) -> None:
    base = tiny(name)
    base.save_pretrained(tmp_path / "base")
    trainable = ["decoder.*"] + ["post_quant_conv.*"] * hasattr(base, "post_quant_conv")
    config = write_config(
        tmp_path, write_images(tmp_path / "images", 6), model={"kind": "pretrained"}, init_from=str(tmp_path / "base"),
        trainable=trainable, max_train_images=4, adversary={"weight": 0.5}, checkpoint_every_images=2,
        gradient_checkpointing=True, losses={"l1": {}} if name == "AutoencoderRAE" else TINY["losses"],
    )  # fmt: skip
    planned = run(config, "--dry_run")
    assert planned.returncode == 0 and "GFLOP" in planned.stdout, planned.stderr
    done = run(config)
    assert done.returncode == 0, done.stderr
    trained = load_autoencoder(tmp_path / "run" / "vae")
    assert type(trained) is getattr(autoencoders, name) and own_normalisation(trained) == own_normalisation(base)
    assert encoder_fingerprint(trained) == encoder_fingerprint(base)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 4


def test_a_scaling_that_is_a_class_default_counts_where_the_encoder_is_stable_diffusions() -> None:
    with torch.device("meta"):
        published, other = AsymmetricConfig().build(), tiny("AsymmetricAutoencoderKL")
    assert not is_default(Normalisation(0.18215), published) and is_default(Normalisation(0.18215), other)


def test_what_cannot_be_trained_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="init_from"):
        Training(**TINY | {"output_dir": "x", "data": {"kind": "folder", "path": "x"}, "model": {"kind": "pretrained"}})
    with refused(UsageError, "init_from"):
        build_autoencoder(settings_for(tiny("VQModel"), tmp_path / "vq"))
    with refused(UsageError, "model.in_channels"):
        grey = {
            "model": {"kind": "pretrained", "in_channels": 1},
            "data": {"kind": "folder", "path": "x", "channels": 1},
        }
        build_autoencoder(settings_for(tiny("AutoencoderDC"), tmp_path / "dc", **grey))
    with refused(UsageError, "trainable"):
        build_autoencoder(settings_for(tiny("AutoencoderRAE"), tmp_path / "rae", trainable=["encoder.*"]))
    bases = {
        "kl": (tiny("AutoencoderKL", block_out_channels=[8, 16], norm_num_groups=4), "model.attention_levels"),
        "flux2": (tiny("AutoencoderKLFlux2"), "model.block_out_channels"),
        "dc": (tiny("AutoencoderDC"), "model.attention_head_dim"),
        "asymmetric": (tiny("AutoencoderKL"), "model.kind"),
    }
    for kind, (base, field) in bases.items():
        with refused(UsageError, field):
            build_autoencoder(settings_for(base, tmp_path / kind, model=SCRATCH[kind]))
    with pytest.raises(ValidationError, match="ignore_mismatched_sizes"):
        settings_for(tiny("AutoencoderDC"), tmp_path / "dc", model=SCRATCH["dc"], ignore_mismatched_sizes=True)
