"""Single files: the names are LDM's, round trips are exact to the bit, and what cannot be told is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from fork_server import fork
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny_networks import to_ldm

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.single_file import CONFIG_KEY, load_single_file, save_single_file
from ldm_vae.autoencoder.weights.ldm_keys import to_ldm_name
from ldm_vae.core.errors import UsageError
from train import autoencoder as training_program

SHAPES: dict[str, dict[str, Any]] = {
    "f2": {"block_out_channels": (32, 64), "layers_per_block": 1},
    "f8": {"block_out_channels": (32, 64, 64, 32), "layers_per_block": 2, "latent_channels": 16},
    "no_quant_conv": {"block_out_channels": (32, 32), "use_quant_conv": False, "use_post_quant_conv": False},
    "no_attention": {"block_out_channels": (32, 64, 64), "mid_block_add_attention": False, "latent_channels": 3},
    "grey": {"block_out_channels": (64,), "in_channels": 1},
}


def build(shape: dict[str, Any]) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderConfig(**shape).build()


def same(one: AutoencoderKL, other: AutoencoderKL) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("diffusers_name", "ldm_name"),
    [
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.down_blocks.0.downsamplers.0.conv.bias", "encoder.down.0.downsample.conv.bias"),
        ("encoder.down_blocks.3.attentions.1.to_q.weight", "encoder.down.3.attn.1.q.weight"),
        ("encoder.mid_block.attentions.0.group_norm.weight", "encoder.mid.attn_1.norm.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid.attn_1.proj_out.bias"),
        ("decoder.mid_block.resnets.1.norm2.weight", "decoder.mid.block_2.norm2.weight"),
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up.1.upsample.conv.weight"),
        ("decoder.up_blocks.0.attentions.2.to_k.weight", "decoder.up.3.attn.2.k.weight"),
        ("decoder.conv_norm_out.bias", "decoder.norm_out.bias"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_names(diffusers_name: str, ldm_name: str) -> None:
    assert to_ldm_name(diffusers_name, 4) == ldm_name


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_equal_and_the_shape_is_found(shape: str, prefix: str, tmp_path: Path) -> None:
    vae = build(SHAPES[shape])
    path = save_single_file(vae, tmp_path / "vae.safetensors", prefix)
    tensors = load_file(path)
    assert all(name.startswith(prefix) for name in tensors)
    assert all(value.ndim == 4 for name, value in tensors.items() if name.endswith((".q.weight", "proj_out.weight")))
    assert same(load_single_file(path), vae)
    # as another program would have written it: without our header
    save_file(tensors, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    foreign = load_single_file(tmp_path / "foreign.safetensors")
    assert same(foreign, vae)
    keys = AutoencoderConfig().shape()
    assert {key: foreign.config[key] for key in keys} == {key: vae.config[key] for key in keys}


def test_diffusers_reads_our_file(tmp_path: Path) -> None:
    vae = build(SHAPES["f8"])
    vae.save_pretrained(tmp_path / "folder")
    for prefix in ("", "first_stage_model."):
        path = save_single_file(vae, tmp_path / "vae.safetensors", prefix)
        assert same(AutoencoderKL.from_single_file(str(path), config=str(tmp_path / "folder")), vae)


def test_attention_in_the_lower_blocks(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    save_file(to_ldm(vae.state_dict(), 2), tmp_path / "vae.safetensors")
    assert same(load_single_file(tmp_path / "vae.safetensors"), vae)


def test_diffusers_names_in_one_file(tmp_path: Path) -> None:
    vae = build(SHAPES["f8"])
    vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert same(load_single_file(path), vae)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "old.safetensors")
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    assert same(load_single_file(tmp_path / "old.safetensors"), vae)


def test_a_shape_of_ones_own_needs_a_config(tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(to_ldm(tiny_vae.state_dict(), 2), path)
    with refused(UsageError, "--config"):
        load_single_file(path)
    assert same(load_single_file(path, tiny_vae_folder), tiny_vae)
    assert same(load_autoencoder(path, tiny_vae_folder), tiny_vae)
    config = json.loads((tiny_vae_folder / "config.json").read_text()) | {"latent_channels": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(UsageError, "decoder.conv_in.weight"):
        load_single_file(path, tmp_path)


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = to_ldm(build(SHAPES["f2"]).state_dict(), 2)
    save_file(tensors, tmp_path / "bare.safetensors")
    assert load_single_file(tmp_path / "bare.safetensors").config.scaling_factor == 1.0
    assert "does not say its scaling" in capsys.readouterr().err
    full = {f"first_stage_model.{name}": value for name, value in tensors.items()}
    full["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)
    save_file(full, tmp_path / "sd.safetensors")
    assert load_single_file(tmp_path / "sd.safetensors").config.scaling_factor == 0.18215
    full["conditioner.embedders.1.model.ln_final.weight"] = torch.zeros(1)
    save_file(full, tmp_path / "sdxl.safetensors")
    assert load_single_file(tmp_path / "sdxl.safetensors").config.scaling_factor == 0.13025
    assert capsys.readouterr().err == ""
    vae = build(SHAPES["f2"])
    vae.register_to_config(scaling_factor=0.7)
    assert load_single_file(save_single_file(vae, tmp_path / "own.safetensors")).config.scaling_factor == 0.7


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: t.pop("encoder.conv_in.weight"), "encoder.conv_in.weight"),
        (lambda t: t.pop("decoder.mid.block_1.conv1.bias"), "decoder.mid.block_1.conv1.bias"),
        (lambda t: t.pop("decoder.conv_in.weight"), "decoder.conv_in.weight"),
        (lambda t: t.update({"encoder.extra.weight": torch.zeros(1)}), "encoder.extra.weight"),
        (lambda t: t.update({"quant_conv.weight": torch.zeros(4, 8, 1, 1)}), "encoder"),
    ],
)
def test_files_that_are_none(change: Any, field: str, tmp_path: Path) -> None:
    tensors = dict(to_ldm(build(SHAPES["f2"]).state_dict(), 2))
    change(tensors)
    save_file(tensors, tmp_path / "vae.safetensors")
    with refused(UsageError, field):
        load_single_file(tmp_path / "vae.safetensors")


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UsageError, match=r"vae\.safetensors"):
        load_single_file(tmp_path / "vae.safetensors")
    vae = build(SHAPES["f2"])
    save_file(to_ldm(vae.state_dict(), 2), tmp_path / "vae.safetensors", metadata={CONFIG_KEY: "{"})
    with pytest.raises(UsageError, match="config in its header"):
        load_single_file(tmp_path / "vae.safetensors")


def test_pickles_are_read_with_a_flag_and_tensors_alone(tmp_path: Path) -> None:
    vae = build(SHAPES["f2"])
    full = {f"first_stage_model.{name}": value for name, value in to_ldm(vae.state_dict(), 2).items()}
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": full, "global_step": 3}, path)
    with refused(UsageError, "--weights_only_pickle"):
        load_single_file(path)
    assert same(load_single_file(path, allow_pickle=True), vae)

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": full, "callback": Hostile()}, path)
    with pytest.raises(UsageError, match=r"old\.ckpt"):
        load_single_file(path, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_the_weights_of_a_diffusers_folder_find_their_config(tiny_vae: AutoencoderKL, tiny_vae_folder: Path) -> None:
    # 4 groups and widths below 32: from the tensors alone this could not be told
    assert same(load_single_file(tiny_vae_folder / "diffusion_pytorch_model.safetensors"), tiny_vae)


@pytest.mark.slow
def test_fine_tuning_starts_from_a_single_file(image_folder: Path, tmp_path: Path) -> None:
    vae = build(SHAPES["f2"])
    path = save_single_file(vae, tmp_path / "start.safetensors", "first_stage_model.")
    settings = {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(path),
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_images": 4,
        "learning_rate": 1e-9,  # so that what comes out is what went in
        "dataloader_num_workers": 0,
        "model": {"block_out_channels": [32, 64], "layers_per_block": 1},
        "losses": {"l1": {"weight": 1.0}},
        "data": {"kind": "folder", "path": str(image_folder)},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = fork(training_program.main, [str(tmp_path / "config.yaml")]).wait()
    assert done.returncode == 0, done.stderr
    tuned, start = load_autoencoder(tmp_path / "run").state_dict(), vae.state_dict()
    assert all(torch.allclose(value, start[name], atol=1e-6) for name, value in tuned.items())
    assert any(not torch.equal(value, start[name]) for name, value in tuned.items())
