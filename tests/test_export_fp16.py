"""fp16: an inflated VAE is found, rescaled and certified; the fp32 image stays; what cannot be helped is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from sentences import refused
from tiny_classes import IMAGES, tiny

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.export.diffusers_folder import configured_copy
from ldm_vae.export.fp16.audit import LARGEST, audit
from ldm_vae.export.fp16.certificate import certify
from ldm_vae.export.fp16.probes import Probes, extreme_images, make_probes
from ldm_vae.export.fp16.rescale import WANTED_HEADROOM, rescale, scale_by
from ldm_vae.export.fp16.structure import is_scalable, structure_of

SHAPES: dict[str, dict[str, Any]] = {
    "shortcuts": {"block_out_channels": (8, 16, 16), "layers_per_block": 2},
    "attention": {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "attention_levels": (1, 2)},
    "no_attention": {"block_out_channels": (8, 16), "mid_block_add_attention": False},
    "no_quant_conv": {"block_out_channels": (16, 8), "use_quant_conv": False, "use_post_quant_conv": False},
}
INFLATION = 2.0**18  # 3e5 times, as in the wild


def build(shape: str) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderConfig(**{"norm_num_groups": 4, "layers_per_block": 1} | SHAPES[shape]).build().eval()
    # the probes' side: one that no config says is 512
    vae.register_to_config(sample_size=32, _use_default_values=[])
    return vae


def inflated(vae: AutoencoderKL, factor: float = INFLATION) -> AutoencoderKL:
    """The same function in fp32, its residual stream and its branches `factor` times larger."""
    copy, structure = configured_copy(vae), structure_of(vae)
    names = [s.start for s in structure.stretches] + [b.convolution for b in structure.branches]
    scale_by(copy, structure, dict.fromkeys(names, factor))
    return copy


@torch.no_grad()
def largest_difference(one: AutoencoderKL, other: AutoencoderKL, probes: Probes) -> float:
    moments = (latents.encode(vae, probes.images).mean for vae in (one, other))
    # latents of images: zeros make a stream of random weights so thin that GroupNorm's epsilon shows
    pixels = (latents.decode(vae, probes.z[: len(probes.images)]) for vae in (one, other))
    return max(float(torch.sub(*pair).abs().max()) for pair in (moments, pixels))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_inflated_is_fixed(shape: str) -> None:
    vae = build(shape)
    probes = make_probes(vae)
    big = inflated(vae)
    assert largest_difference(vae, big, probes) < 1e-3  # in fp32 the same image: nobody sees it before fp16
    before = audit(big, probes)
    assert before.headroom("encoder") < 1 and before.headroom("decoder") < 1 and not before.safe
    broken = certify(big, probes)
    assert all(value != value for value in broken.psnr.values()) and not broken.passed  # NaN in both halves

    rescaling = rescale(big, before)
    certificate = certify(big, probes, rescaling, before)
    assert certificate.passed and not certificate.limits
    assert min(certificate.psnr.values()) >= 60
    assert certificate.change is not None and max(certificate.change.values()) < 1e-3
    assert min(certificate.after.headroom(side) for side in ("encoder", "decoder")) >= WANTED_HEADROOM
    # powers of two: dividing by them gives the old weights back, bit for bit
    undone = configured_copy(rescaling.vae)
    scale_by(undone, structure_of(undone), {name: 1 / factor for name, factor in rescaling.factors.items()})
    assert all(torch.equal(value, undone.state_dict()[name]) for name, value in big.state_dict().items())


def test_every_layer_is_in_the_structure() -> None:
    vae = build("shortcuts")
    structure = structure_of(vae)
    norms = [norm for stretch in structure.stretches for norm in stretch.norms] + [b.norm for b in structure.branches]
    assert sorted(norms) == sorted(n for n, m in vae.named_modules() if isinstance(m, torch.nn.GroupNorm))
    writers = [name for stretch in structure.stretches for name in (stretch.start, *stretch.writers)]
    assert len(writers) == len(set(writers))


def test_a_safe_model_is_left_alone() -> None:
    vae = build("shortcuts")
    found = audit(vae, make_probes(vae))
    assert found.safe and rescale(vae, found).factors == {}


def test_chains_take_their_factor_back() -> None:
    vae = build("shortcuts")
    probes = make_probes(vae)
    big, structure = configured_copy(vae), structure_of(vae)
    scale_by(big, structure, {chain.name: INFLATION for chain in structure.chains})
    assert largest_difference(vae, big, probes) < 1e-4
    before = audit(big, probes)
    assert {"encoder.conv_out", "post_quant_conv"} <= {n for n, value in before.largest.items() if value > LARGEST}
    certificate = certify(big, probes, rescale(big, before), before)
    assert certificate.passed and min(certificate.psnr.values()) >= 60


def test_what_cannot_be_scaled_is_named() -> None:
    vae = build("shortcuts")
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 1e6
    probes = make_probes(vae)
    before = audit(vae, probes)
    certificate = certify(vae, probes, rescale(vae, before), before)
    assert not certificate.passed
    assert any("decoder.conv_out" in limit for limit in certificate.limits)


def test_epsilon_and_small_weights_set_a_limit() -> None:
    vae = inflated(build("no_attention"), 2.0**10)
    structure = structure_of(vae)
    # one channel group of the stream explodes, the others stay thin: no constant is right for both
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name in structure.stretches[0].writers:
                module.weight[:2] *= 2.0**12
                module.weight[2:] *= 2.0**-22
    probes = make_probes(vae)
    limits = rescale(vae, audit(vae, probes)).limits
    assert any("encoder.down_blocks.0.resnets.0" in limit and "would not bear more" in limit for limit in limits)


def test_nan_in_fp32_is_an_error() -> None:
    vae = build("no_attention")
    with torch.no_grad():
        vae.decoder.conv_in.bias[0] = float("inf")
    with refused(WorkError, "decoder.conv_in"):
        audit(vae, make_probes(vae))


def test_extremes_are_extreme() -> None:
    images = extreme_images(3, 16)
    assert images.shape == (7, 3, 16, 16) and images.min() == -1 and images.max() == 1
    assert len({float(image.mean()) for image in images}) >= 5


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fix_as_a_user_calls_it(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inflated(build("shortcuts")).save_pretrained(tmp_path / "big")
    assert run_cli("fp16", "audit", tmp_path / "big", image_folder, "--images", 3) == 0
    assert "NOT safe in fp16" in capsys.readouterr().out
    # an export of it keeps pipelines in fp32, because a test says so
    assert run_cli("export", tmp_path / "big", tmp_path / "kept") == 0
    assert "force_upcast true" in capsys.readouterr().out
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["force_upcast"] is True
    assert run_cli("fp16", "fix", tmp_path / "big", tmp_path / "out", image_folder, "--images", 3) == 0
    printed = capsys.readouterr().out
    assert "verdict: safe in fp16" in printed and "3 images and 7 synthetic" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["force_upcast"] is False
    assert "## Half precision" in (tmp_path / "out" / "README.md").read_text()
    assert run_cli("fp16", "audit", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["safe"] is True


def test_fix_writes_nothing_when_it_cannot_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = build("no_attention")
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 1e6
    vae.save_pretrained(tmp_path / "vae")
    assert run_cli("fp16", "fix", tmp_path / "vae", tmp_path / "out") == 1
    assert "decoder.conv_out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- every class ------------------------------------------------------------------------------------------------------


def small_probes(vae: Any) -> Probes:
    """Two images and their latents."""
    probes = make_probes(vae, resolution=geometry_of(vae).side or 32)
    return Probes(probes.images[3:5], probes.z[3:5], 0)


@pytest.mark.parametrize("name", IMAGES)
def test_every_class_is_audited(name: str) -> None:
    vae = tiny(name)
    probes = small_probes(vae)
    found = audit(vae, probes)
    with torch.no_grad():
        z = latents.encode(vae, probes.images).mean
        pixels = latents.decode(vae, probes.z)
    assert (
        found.safe and found.sides.keys() == found.largest.keys() and {*found.sides.values()} == {"encoder", "decoder"}
    )
    # the largest is no smaller than what comes out (RAE brings both to its statistics behind the last layer)
    if name not in ("AutoencoderRAE", "ConsistencyDecoderVAE"):
        assert found.worst("encoder")[1] >= float(z.abs().max()) * 0.999
        assert found.worst("decoder")[1] >= float(pixels.abs().max()) * 0.999
    # one layer that reaches further
    leaves = {layer: module for layer, module in vae.named_modules() if not any(True for _ in module.children())}
    layer, value = max(((layer, found.of("decoder").get(layer, 0.0)) for layer in leaves), key=lambda row: row[1])
    with torch.no_grad():
        for parameter in leaves[layer].parameters():
            parameter *= 100 * LARGEST / value
    worse = audit(vae, probes)
    assert not worse.safe and worse.headroom("decoder") < 1 and worse.headroom("encoder") == found.headroom("encoder")


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "VQModel"])
def test_what_is_built_alike_is_fixed(name: str) -> None:
    vae = tiny(name)
    big, structure = configured_copy(vae), structure_of(vae)
    names = [s.start for s in structure.stretches] + [b.convolution for b in structure.branches]
    scale_by(big, structure, dict.fromkeys(names, INFLATION))
    probes = make_probes(vae, resolution=32)
    before = audit(big, probes)
    assert not before.safe
    rescaling = rescale(big, before)
    assert audit(rescaling.vae, probes).safe
    assert largest_difference(big, rescaling.vae, probes) < 1e-3


@pytest.mark.parametrize("name", [name for name in IMAGES if not is_scalable(tiny(name))])
def test_what_is_built_otherwise_is_not_fixed(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    vae.save_pretrained(tmp_path / "vae")
    assert run_cli("fp16", "fix", tmp_path / "vae", tmp_path / "out") == 2
    with refused(UsageError, "fix"):
        structure_of(vae)


def test_sizes_that_would_be_cut_are_not_probed() -> None:
    with refused(UsageError, "resolution"):
        make_probes(tiny("AutoencoderKLFlux2"), resolution=34)
