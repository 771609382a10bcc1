"""Every shipped config: its header says how to run it, what it costs and what to expect, and it builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from published_bases import build_outline, shallow, stand_in
from repository import ROOT
from tiny_networks import TinyLPIPS

from ldm_vae.autoencoder.fine_tuning import encoder_learns
from ldm_vae.autoencoder.geometry import check_resolution, downsampling_factor
from ldm_vae.autoencoder.lengths import check_frames, lengths_of
from ldm_vae.autoencoder.trainable import count_parameters
from ldm_vae.core import config
from ldm_vae.diffusion.config import DiffusionTraining
from ldm_vae.losses import lpips
from ldm_vae.prior.config import PriorTraining
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.config import (
    Training,
    build_autoencoder,
    build_discriminator,
    build_network,
    build_objective,
    learning,
)
from ldm_vae.training.smallest_crop import crop_size
from ldm_vae.training.step import TrainingStep

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DIFFUSION_CONFIGS = sorted((ROOT / "configs" / "diffusion").glob("*.yaml"))
PRIOR_CONFIGS = sorted((ROOT / "configs" / "prior").glob("*.yaml"))

# measured: a command and a date; published: a figure and its source; or openly not yet run
EXPECTATION = re.compile(r"measured.*\d{4}-\d{2}-\d{2}|published: .*\d.*\(.+\)|not yet run", re.DOTALL)


def header_of(text: str) -> dict[str, str]:
    """The fields of the opening comment."""
    lines = [line[1:].strip() for line in text.split("\n\n", 1)[0].splitlines()]
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        found = re.match(r"(command|cost|expected):\s*(.*)", line)
        if found:
            name = found[1]
            fields[name] = found[2]
        elif name and line:
            fields[name] += f" {line}"
        else:
            name = ""
    return fields


def complaints(text: str) -> list[str]:
    fields = header_of(text)
    missing = [name for name in ("command", "cost", "expected") if not fields.get(name)]
    if "expected" in fields and not EXPECTATION.search(fields["expected"]):
        missing.append("expected is neither measured, published nor 'not yet run'")
    return missing


@pytest.mark.parametrize("path", [*CONFIGS, *DIFFUSION_CONFIGS, *PRIOR_CONFIGS], ids=lambda path: path.stem)
def test_the_header_tells_command_cost_and_result(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "a config opens with what it is for"
    assert complaints(text) == []


def test_a_header_with_an_invented_result_is_rejected() -> None:
    good = "# A thing.\n#\n# command:  run it\n# cost:     1 minute\n# expected: not yet run\n\na: 1\n"
    assert complaints(good) == []
    assert complaints(good.replace("not yet run", "about 30 dB")) != []
    assert complaints(good.replace("# cost:     1 minute\n", "")) == ["cost"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_builds(path: Path) -> None:
    settings = config.load(Training, path)
    vae = build_outline(settings)
    with torch.device("meta"):
        critic = build_discriminator(settings, outline=True)
    if settings.model.kind == "pretrained":
        millions = count_parameters(vae.parameters()) / 1e6
        assert f"{millions:.2f} M parameters" in header_of(path.read_text())["cost"]
        learning(vae, settings.trainable)
        assert not encoder_learns(vae)
    check_resolution(crop_size(settings)[-1], vae)
    assert (critic is not None) == settings.adversary.enabled
    if path.stem.startswith(("vq_f", "dvae_")):
        factor, codes = re.match(r"d?vq?a?e?_f(\d+)_(\d+)", path.stem).groups()
        assert downsampling_factor(vae) == int(factor) and vae.config.num_vq_embeddings == int(codes)
    factor, channels = (
        re.match(r"kl_f(\d+)_d(\d+)", path.stem).groups() if path.stem.startswith("kl_") else (None, None)
    )
    if factor:
        assert downsampling_factor(vae) == int(factor)
        assert vae.config.latent_channels == int(channels)
    if path.stem.startswith("wan_"):
        named = re.fullmatch(r"wan_t(\d+)_f(\d+)_d(\d+)", path.stem).groups()
        lengths = lengths_of(vae)
        assert (lengths.step, downsampling_factor(vae), vae.config.z_dim) == tuple(map(int, named))
        millions = count_parameters(vae.parameters()) / 1e6
        assert f"{millions:.2f} M parameters" in header_of(path.read_text())["cost"]
    if getattr(settings.data, "frames", None) is not None:
        check_frames(vae, settings.data.frames)
    if path.stem == "demo_audio":
        millions = count_parameters(vae.parameters()) / 1e6
        assert f"{millions:.2f} M parameters" in header_of(path.read_text())["cost"]
        assert vae.latency <= 0.02
    if path.stem == "kl_f8_d4":
        assert count_parameters(vae.parameters()) == 83_653_863  # Stable Diffusion's


@pytest.mark.parametrize("path", DIFFUSION_CONFIGS, ids=lambda path: path.stem)
def test_every_diffusion_config_loads_and_builds(path: Path) -> None:
    settings = config.load(DiffusionTraining, path)
    side = settings.crop or 32
    with torch.device("meta"):
        network = settings.denoiser.build(4, (side, side), 10)
    if path.stem == "imagenet_256":  # DiT-B/2's blocks
        blocks = [p for name, p in network.named_parameters() if name.startswith("transformer_blocks")]
        inside = sum(p.numel() for p in blocks) - sum(
            p.numel() for block in network.transformer_blocks for p in block.norm1.emb.parameters()
        )
        assert inside == 12 * (4 * 768 * 769 + 768 * 4 * 769 + 4 * 768 * 768 + 768 + 6 * 768 * 769)


@pytest.mark.parametrize("path", PRIOR_CONFIGS, ids=lambda path: path.stem)
def test_every_prior_config_loads_and_builds(path: Path) -> None:
    settings = config.load(PriorTraining, path)
    side = settings.crop or 32
    with torch.device("meta"):
        prior = settings.model.build(16384, (1, side, side), 1000)
    assert prior.is_exact
    if path.stem == "imagenet_256":
        # GPT-2's blocks at 768: 12 width^2 and the biases and norms of a block
        blocks = sum(p.numel() for name, p in prior.network.named_parameters() if name.startswith("blocks"))
        assert blocks == 12 * (12 * 768**2 + 13 * 768)


def narrow(settings: Training) -> Training:
    """The same config with an eighth of the widths and of the resolution's cost: everything in it, small."""
    model = settings.model
    adversary = settings.adversary.model_copy(update={"start_images": 0})
    if model.kind == "pretrained":
        return settings.model_copy(update={"mixed_precision": "no", "adversary": adversary})
    widths = {name: tuple(max(4, width // 32 * 4) for width in value)
              for name, value in model.shape().items() if name.endswith("block_out_channels")}  # fmt: skip
    small = {"norm_num_groups": 4, "num_vq_embeddings": 64, "base_dim": 8}
    model = model.model_copy(update=widths | {name: value for name, value in small.items() if hasattr(model, name)})
    size = min(settings.resolution, 64)
    changed = {"model": model, "resolution": size, "init_from": None, "mixed_precision": "no", "adversary": adversary}
    return settings.model_copy(update=changed)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_a_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "random_lpips", lambda net: TinyLPIPS())
    settings = narrow(shallow(stand_in(config.load(Training, path), monkeypatch)))
    accelerator = Accelerator(cpu=True)
    vae = build_autoencoder(settings)
    network = build_network(settings, vae, outline=True)
    objective, critic = build_objective(settings, outline=True), build_discriminator(settings, outline=True)
    objective.attach(network)
    optimizer = settings.optimizer.build(trainable_parameters([network, objective]), 1e-3)
    critic_optimizer = None if critic is None else settings.optimizer.build(trainable_parameters([critic]), 1e-3)
    step = TrainingStep(
        accelerator, network, objective, optimizer, Adversary(settings.adversary), critic, critic_optimizer
    )
    before = [parameter.detach().clone() for parameter in trainable_parameters([network, objective])]
    size = crop_size(settings)
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, settings.model.in_channels, *size, generator=draw) * 2 - 1
    logs = step(images, torch.randn(2, *network.noise_shape(*size), generator=draw), 0)
    assert all(value.isfinite().all() for value in logs.values()), logs
    assert {f"loss/{name}" for name in settings.losses} <= set(logs)
    moved = [
        not torch.equal(old, new) for old, new in zip(before, trainable_parameters([network, objective]), strict=True)
    ]
    assert sum(moved) / len(moved) > 0.9


def test_the_named_configs_exist() -> None:
    named = {"vq_f8_16384", "vq_f4_8192", "dvae_f8_8192", "tiny", "textbook_vae", "textbook_beta_vae"}
    assert named <= {path.stem for path in CONFIGS}
    named = {"kl_f4_d3", "kl_f8_d4", "kl_f8_d16", "kl_f16_d16", "kl_f32_d64", "smoke", "demo"}
    named |= {"finetune_decoder_sd", "finetune_decoder_sd_8gb", "finetune_sdxl", "finetune_flux"}
    named |= {
        "dc_f32_d32",
        "finetune_decoder_flux2",
        "finetune_decoder_qwenimage",
        "finetune_decoder_sana",
        "finetune_decoder_wan",
        "rae_decoder",
        "wan_t4_f8_d16",
    }
    assert named <= {path.stem for path in CONFIGS}
