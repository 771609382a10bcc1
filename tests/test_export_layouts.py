"""Single files of the classes that are not AutoencoderKL: diffusers' own converters read them, and we read them back.

Its converters name a fixed number of blocks: Wan's are tested with two a stage and the widths 1, 2, 4, 4. It has none
for FLUX.2, HunyuanImage and Wan 2.2, and Qwen-Image's file is Wan's: docs/export.md says what ComfyUI was seen to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models import autoencoders
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny_classes import tiny

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.single_file import load_single_file, save_single_file
from ldm_vae.autoencoder.weights.layouts import LAYOUTS, file_names, to_file
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.text import an
from ldm_vae.export.diffusers_folder import configured_copy
from ldm_vae.export.targets import TARGETS, warnings_for, write_target

CONV, LINEAR = "ResBlock", "EfficientViTBlock"
WAN = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
WAN22 = WAN | {
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8,
}  # fmt: skip
HUNYUAN = {"block_out_channels": (32, 32, 32), "sample_size": 32}
DEEP = {
    **{f"{side}_block_out_channels": (8, 8, 8, 16) for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": (0, 2, 1, 2) for side in ("encoder", "decoder")},
    **{f"{side}_block_types": (CONV, CONV, LINEAR, LINEAR) for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": ((), (), (5,), ()) for side in ("encoder", "decoder")},
    "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
    "downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", {}),
    "flux2": ("AutoencoderKLFlux2", {}),
    "wan": ("AutoencoderKLWan", WAN),
    "wan22": ("AutoencoderKLWan", WAN22),
    "qwen": ("AutoencoderKLQwenImage", WAN),
    "hunyuan": ("AutoencoderKLHunyuanImage", HUNYUAN | {"spatial_compression_ratio": 4}),
    "hunyuan_shallow": ("AutoencoderKLHunyuanImage", HUNYUAN | {"spatial_compression_ratio": 2}),  # one sampler
    "dc_sana": ("AutoencoderDC", {}),
    "dc": ("AutoencoderDC", DEEP),
}
BY_DIFFUSERS = ["kl", "wan", "dc_sana", "dc"]


def case(name: str) -> Any:
    kind, changes = CASES[name]
    return tiny(kind, **changes)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    vae, path = case(name), tmp_path / "vae.safetensors"
    write_target(configured_copy(vae), path)
    back = load_single_file(path)  # its header says the class and the shape
    assert type(back) is type(vae) and same(back, vae)
    # as another program would have written it, inside something larger
    vae.save_config(tmp_path)
    save_file({f"first_stage_model.{key}": one for key, one in load_file(path).items()}, path)
    assert same(load_single_file(path, tmp_path), vae)
    # and with diffusers' names
    save_file(vae.state_dict(), path)
    assert same(load_single_file(path, tmp_path), vae)


@pytest.mark.parametrize("name", BY_DIFFUSERS)
def test_diffusers_reads_our_file(name: str, tmp_path: Path) -> None:
    vae, path = case(name), tmp_path / "vae.safetensors"
    write_target(configured_copy(vae), path, name="single_file")
    vae.save_config(tmp_path)
    assert same(type(vae).from_single_file(str(path), config=str(tmp_path)), vae)


def test_diffusers_converter_of_wan_reads_qwen_images_file() -> None:
    vae = case("qwen")
    came = convert_wan_vae_to_diffusers(to_file(vae))
    assert came.keys() == vae.state_dict().keys()
    assert all(torch.equal(value, came[name]) for name, value in vae.state_dict().items())


def test_the_classes_of_from_single_file_are_those_of_diffusers() -> None:
    assert TARGETS["single_file"].classes.keys() == SINGLE_FILE_LOADABLE_CLASSES.keys() & LAYOUTS.keys()


@pytest.mark.parametrize(
    ("name", "own", "there"),
    [
        ("flux2", "post_quant_conv.bias", "decoder.post_quant_conv.bias"),
        ("flux2", "quant_conv.weight", "encoder.quant_conv.weight"),
        ("flux2", "bn.running_var", "bn.running_var"),
        ("flux2", "decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.up.1.block.0.conv1.weight"),
        ("hunyuan", "encoder.down_blocks.1.conv.weight", "encoder.down.0.downsample.conv.weight"),
        ("hunyuan", "encoder.down_blocks.4.norm1.weight", "encoder.down.2.block.0.norm1.weight"),
        ("hunyuan", "decoder.up_blocks.2.conv.bias", "decoder.up.0.upsample.conv.bias"),
        ("hunyuan", "decoder.up_blocks.7.conv2.bias", "decoder.up.2.block.1.conv2.bias"),
        ("hunyuan_shallow", "encoder.down_blocks.3.norm1.weight", "encoder.down.2.block.0.norm1.weight"),
        ("hunyuan_shallow", "decoder.up_blocks.4.norm1.weight", "decoder.up.1.block.1.norm1.weight"),
        ("hunyuan", "encoder.mid_block.attentions.0.to_q.weight", "encoder.mid.attn_1.q.weight"),
        ("hunyuan", "encoder.mid_block.attentions.0.proj.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("wan22", "encoder.down_blocks.1.downsampler.time_conv.bias",
         "encoder.downsamples.1.downsamples.2.time_conv.bias"),
        ("wan22", "encoder.down_blocks.1.resnets.1.norm2.gamma",
         "encoder.downsamples.1.downsamples.1.residual.3.gamma"),
        ("wan22", "decoder.up_blocks.0.upsampler.resample.1.bias", "decoder.upsamples.0.upsamples.3.resample.1.bias"),
        ("wan22", "decoder.up_blocks.2.resnets.0.conv1.bias", "decoder.upsamples.2.upsamples.0.residual.2.bias"),
        ("wan", "decoder.up_blocks.2.upsamplers.0.resample.1.bias", "decoder.upsamples.11.resample.1.bias"),
    ],
)  # fmt: skip
def test_names_that_diffusers_has_no_converter_for(name: str, own: str, there: str) -> None:
    """ComfyUI's networks have these names; both sides of each pair were seen in their sources."""
    assert file_names(case(name))[own] == there


# --- without a config -------------------------------------------------------------------------------------------------


def test_the_shape_of_flux2_is_told_by_its_tensors(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLFlux2", block_out_channels=(32, 32), norm_num_groups=32)
    save_file(to_file(vae), tmp_path / "vae.safetensors")
    back = load_single_file(tmp_path / "vae.safetensors")
    assert type(back) is type(vae) and same(back, vae)
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert same(load_single_file(weights.rename(tmp_path / "names.safetensors")), vae)


@pytest.mark.parametrize("name", ["wan", "qwen", "hunyuan", "dc"])
def test_other_layouts_need_a_config_and_name_their_classes(name: str, tmp_path: Path) -> None:
    save_file(to_file(case(name)), tmp_path / "vae.safetensors")
    with refused(UsageError, "--config FOLDER"):
        load_single_file(tmp_path / "vae.safetensors")


def test_a_stack_of_another_height_is_refused(tmp_path: Path) -> None:
    vae = case("dc_sana")
    tensors, name = to_file(vae), "encoder.stages.1.op_list.0.context_module.main.qkv.conv.weight"
    assert tensors[name].shape[0] % 3 == 0
    vae.save_config(tmp_path)
    for rows in (tensors[name][:-1], tensors[name][:-3]):
        save_file(tensors | {name: rows.contiguous()}, tmp_path / "vae.safetensors")
        with refused(UsageError, "to_q"):
            load_single_file(tmp_path / "vae.safetensors", tmp_path)


# --- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("comfyui", "AutoencoderDC"),
        ("comfyui", "AutoencoderRAE"),
        ("single_file", "AutoencoderKLFlux2"),
        ("single_file", "AutoencoderKLQwenImage"),
        ("kohya", "AutoencoderKLWan"),
        ("a1111", "VQModel"),
    ],
)
def test_a_class_that_a_program_reads_no_file_of(
    target: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(kind).save_pretrained(tmp_path / "vae")
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--target", target) == 2
    said = capsys.readouterr().err
    assert f"--target {target}" in said and f"reads no single file of {an(kind)}" in said
    takers = [name for name, one in TARGETS.items() if kind in one.classes]
    assert all(name in said for name in takers) and ("no program is known" in said) == (not takers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_res_blocks": 1}, WAN22])
def test_a_shape_that_diffusers_converter_does_not_name(changes: dict[str, Any], tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLWan", **WAN | changes)
    with pytest.raises(UsageError, match="from_single_file does not take a network of this shape"):  # diffusers' words
        write_target(configured_copy(vae), tmp_path / "vae.safetensors", name="single_file")
    assert not (tmp_path / "vae.safetensors").exists()


def test_a_file_that_does_not_read_back_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = case("hunyuan")

    def swapped(network: Any) -> dict[str, torch.Tensor]:  # every name is there, two blocks have changed places
        found = to_file(network)
        one, other = "encoder.mid.block_1.conv1.weight", "encoder.mid.block_2.conv1.weight"
        return found | {one: found[other], other: found[one]}

    monkeypatch.setattr("ldm_vae.autoencoder.weights.layouts.to_file", swapped)
    with pytest.raises(WorkError, match="is not what was written"):
        write_target(configured_copy(vae), tmp_path / "vae.safetensors")
    assert not (tmp_path / "vae.safetensors").exists()


HUNYUAN21 = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("AutoencoderKLFlux2", {}, ["0.3.72"]),
        ("AutoencoderKLFlux2", {"batch_norm_eps": 1e-5}, ["0.3.72", "batch_norm_eps 1e-05"]),
        ("AutoencoderKLFlux2", {"use_quant_conv": False}, ["leaves `bn` out"]),
        ("AutoencoderKLFlux2", {"decoder_block_out_channels": (64, 128, 256, 256)}, ["the encoder's widths"]),
        ("AutoencoderKLFlux2", {"layers_per_block": 1}, ["2 residual blocks"]),
        ("AutoencoderKLWan", {}, []),
        ("AutoencoderKLWan", {"base_dim": 32}, ["0.8.0"]),
        ("AutoencoderKLWan", {"num_res_blocks": 1}, ["num_res_blocks 2, this VAE has 1"]),
        ("AutoencoderKLWan", {"latents_mean": [0.0] * 16}, ["latents_mean and latents_std"]),
        ("AutoencoderKLWan", WAN22 | {"latents_mean": [0.0] * 16}, ["base_dim 160, this VAE has 4", "Wan 2.2"]),
        ("AutoencoderKLQwenImage", {}, []),
        ("AutoencoderKLQwenImage", {"z_dim": 8, "latents_std": [1.0] * 8}, ["z_dim 16", "latents_mean"]),
        ("AutoencoderKLHunyuanImage", HUNYUAN21, []),
        ("AutoencoderKLHunyuanImage", HUNYUAN21 | {"scaling_factor": 0.5}, ["0.75289"]),
        ("AutoencoderKLHunyuanImage", HUNYUAN21 | {"layers_per_block": 1}, ["layers_per_block 2"]),
    ],
)  # fmt: skip
def test_what_comfyui_takes(kind: str, changes: dict[str, Any], words: list[str]) -> None:
    with torch.device("meta"):
        config = getattr(autoencoders, kind)(**changes).config
    found = warnings_for(TARGETS["comfyui"], config, kind)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


# --- as a user calls it -----------------------------------------------------------------------------------------------


def test_export_of_sanas_class_for_from_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, out = case("dc_sana"), tmp_path / "mine"
    vae.save_pretrained(tmp_path / "vae")
    call = ("export", tmp_path / "vae", out, "--target", "single_file")
    assert run_cli(*call) == 0
    assert "read back weights equal to the bit" in capsys.readouterr().out
    assert sorted(one.name for one in out.iterdir()) == ["README.md", "config.json", "mine.safetensors"]
    loaded = AutoencoderDC.from_single_file(str(out / "mine.safetensors"), config=str(out))
    assert same(loaded, vae) and loaded.config.scaling_factor == vae.config.scaling_factor
    assert run_cli(*call, "--variant", "fp16") == 0
    assert {value.dtype for value in load_file(out / "mine.safetensors").values()} == {torch.float16}
    # and back, as the class that it is, in one step from the file
    assert run_cli("export", out / "mine.safetensors", tmp_path / "back") == 0
    assert type(load_autoencoder(tmp_path / "back")) is AutoencoderDC


def test_prefix_of_a_full_checkpoint(tmp_path: Path) -> None:
    vae = case("wan")
    path = save_single_file(vae, tmp_path / "vae.safetensors", "vae.")
    assert all(name.startswith("vae.") for name in load_file(path)) and same(load_single_file(path), vae)
