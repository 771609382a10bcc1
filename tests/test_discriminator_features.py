"""The discriminator on frozen features: any vision network of transformers, its heads alone learn and are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from images import write_images
from safetensors.torch import load_file
from sentences import refused
from tiny_networks import network as tiny_network
from training_runs import assert_same_run, metrics, newest, one_sentence, run, run_two, write_config

from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators.features import Config, Features
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.perceptual import vision
from ldm_vae.run.optim import OptimizerConfig, trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.config import Training
from ldm_vae.training.dry_run import plan
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
# the config's class, what it is given, and the positions of a hidden layer 2 of a square of 32 px
BACKBONES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViTConfig", VIT | {"image_size": 32}, 16),
    "vit of another size": ("ViTConfig", VIT | {"image_size": 48}, 16),
    "dinov2": ("Dinov2Config", VIT | {"image_size": 48}, 16),
    "dinov2 with registers": ("Dinov2WithRegistersConfig", VIT | {"image_size": 48}, 16),
    "siglip": ("SiglipVisionConfig", VIT | {"image_size": 32}, 16),
    "convnext": ("ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 16),
    "swin": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        16,
    ),
}


def save(folder: Path, name: str = "vit", seed: int = 0, **changes: Any) -> Path:
    kind, values, _ = BACKBONES[name]
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(getattr(transformers, kind)(**values | changes)).save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return save(tmp_path / "backbone")


def build(folder: Path, **changes: Any) -> Features:
    torch.manual_seed(1)
    return Config(**{"backbone": str(folder), "layers": (1, 2), "kernel": 3, "resolution": 32} | changes).build()


def pictures(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", BACKBONES)
def test_any_vision_network_is_a_backbone(name: str, tmp_path: Path) -> None:
    critic = build(save(tmp_path, name), layers=(2,))
    images = pictures(3, 40).requires_grad_()
    logits = critic(images)
    assert logits.shape == (3, 1, 1, BACKBONES[name][2]) and logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    # neither the other images of a batch nor training mode change a logit
    torch.testing.assert_close(critic.eval()(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    names = {name for name, _ in critic.named_parameters()}
    assert names and all(name.startswith("heads.") for name in names | critic.state_dict().keys() - {"_extra_state"})


def test_heads_see_the_networks_own_hidden_layers(backbone: Path) -> None:
    (backbone / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    critic, images = build(backbone), pictures()
    seen: list[torch.Tensor] = []
    for head in critic.heads:
        head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    critic(images)
    network = transformers.AutoModel.from_pretrained(backbone).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = (images / 2 + 0.5 - mean) / std
    states = network(pixel_values=pixels, output_hidden_states=True).hidden_states
    for found, state in zip(seen, states[1:], strict=True):
        torch.testing.assert_close(found, state[:, 1:].transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_network_without_its_pooler_is_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=32), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    part = Config(backbone=str(tmp_path), layers=(1,), resolution=32)
    one, other = part.build(), part.build()  # with another draw of what the file lacks
    assert one.backbone.network.pooler is None and torch.equal(one.get_extra_state(), other.get_extra_state())


def bert(folder: Path) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**shape, vocab_size=10)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": (1, 3)}, "layers"),
        ({"resolution": 4}, "resolution"),
        ({"backbone": "bert"}, "backbone"),
        ({"backbone": "empty"}, "backbone"),
        ({"backbone": "headless"}, "backbone"),
    ],
)
def test_what_is_no_backbone_is_refused(change: dict[str, Any], field: str, backbone: Path, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "headless")
    (tmp_path / "headless" / "model.safetensors").unlink()
    if "backbone" in change:
        change = {"backbone": str(tmp_path / change["backbone"])}
    with refused(UsageError, field):
        build(backbone, **change)


def test_what_it_cannot_look_at_is_refused(backbone: Path) -> None:
    part = Config(backbone=str(backbone), resolution=32)
    with refused(UsageError, "features"):
        part.outline(4)
    with pytest.raises(ValueError, match="expected an odd number, got 4"):
        Config(kernel=4)
    assert part.model_copy(update={"layers": (1,)}).outline(1)(pictures()[:, :1]).shape == (2, 1, 1, 16)


# --- in the step ------------------------------------------------------------------------------------------------------


def step_of(folder: Path, accumulation: int = 1, **adversary: Any) -> TrainingStep:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    network, critic = tiny_network(codes=False).double(), build(folder).double()
    critic.backbone.network.double()
    optimizers = [
        accelerator.prepare(OptimizerConfig(eps=1e-8).build(trainable_parameters([one]), 1e-3))
        for one in (network, critic)
    ]
    game = Adversary(AdversaryConfig(weight=0.5, **adversary)).double()
    return TrainingStep(
        accelerator, accelerator.prepare(network), Objective({"l1": L1()}), optimizers[0], game,
        accelerator.prepare(critic), optimizers[1],
    )  # fmt: skip


def test_r1_goes_back_twice_through_attention(backbone: Path) -> None:
    step = step_of(backbone, r1_weight=10.0, r1_every=1)
    real = pictures().double()
    logs = step(real, torch.zeros(2, 4, 16, 16).double(), 0)
    assert {"adversary/weight", "adversary/r1", "gradient_norm/discriminator"} <= logs.keys()
    # an attention written out gives the same
    critic = build(backbone).double()
    critic.backbone.network.double().set_attn_implementation("eager")
    real.requires_grad_()
    expected = step.adversary.r1(real, critic(real))
    torch.testing.assert_close(logs["adversary/r1"], expected.detach())


def test_micro_batches_leave_what_one_batch_leaves(backbone: Path) -> None:
    images, results = pictures(4).double(), []
    for parts in (1, 2):
        step = step_of(backbone, parts, adaptive=False, r1_weight=10.0, r1_every=1)
        before = {name: value.clone() for name, value in step.discriminator.state_dict().items()}
        for seen in (0, 4):
            for part in images.chunk(parts):
                step(part, torch.zeros(len(part), 4, 16, 16).double(), seen)
        results.append(step.discriminator.state_dict())
    whole, several = results
    assert any("_u" in name or "0._u" in name for name in whole) and not all(
        torch.equal(before[name], whole[name]) for name in before
    )
    for name, value in whole.items():
        torch.testing.assert_close(several[name], value, rtol=1e-7, atol=1e-9, msg=name)


# --- through the programs ---------------------------------------------------------------------------------------------


def settings_of(folder: Path, images: Path, backbone: Path, **changes: Any) -> Path:
    folder.mkdir()
    critic = {"kind": "features", "backbone": str(backbone), "layers": [1, 2], "kernel": 3, "resolution": 32}
    short = {"max_train_images": 16, "checkpoint_every_images": 8, "log_every_images": 4, "discriminator": critic}
    return write_config(folder, images, **short | {"adversary": {"weight": 0.5, "start_images": 4}} | changes)


def test_a_run_resumes_with_the_network_that_it_began_with(backbone: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 6)
    assert run(settings_of(tmp_path / "whole", images, backbone)).returncode == 0
    parts = settings_of(tmp_path / "parts", images, backbone)
    assert run(parts, "--max_train_images", "8").returncode == 0
    done = run(parts)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    runs = [tmp_path / name / "run" for name in ("whole", "parts")]
    assert_same_run(*runs)
    assert {"adversary/weight", "adversary/discriminator"} <= metrics(runs[0])[-1].keys()
    kept = {name for name in load_file(newest(runs[0]) / "tensors.safetensors") if name.startswith("discriminator.")}
    assert kept and all(name.startswith(("discriminator.heads.", "discriminator._extra")) for name in kept)
    save(backbone, seed=7)
    said = one_sentence(run(parts, "--max_train_images", "24"), 2)
    assert "discriminator.backbone" in said and "is not the network that this run began with" in said


@pytest.mark.slow
def test_two_processes_train_the_same_heads(backbone: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 6)
    flat = {"adversary": {"weight": 0.5, "adaptive": False, "r1_weight": 1.0, "r1_every": 1}}
    assert run(settings_of(tmp_path / "one", images, backbone, train_batch_size=4, **flat)).returncode == 0
    run_two(settings_of(tmp_path / "two", images, backbone, **flat))
    one, two = (load_file(newest(tmp_path / name / "run") / "tensors.safetensors") for name in ("one", "two"))
    for name in (name for name in one if name.startswith("discriminator.heads.") and name.endswith("original")):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-4, msg=name)


def test_a_dry_run_counts_it(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load(Training, settings_of(tmp_path / "run", tmp_path, backbone))
    monkeypatch.setattr(vision, "load_network", None)  # no weights are read
    ours = plan(settings)
    held = sum(parameter.numel() for parameter in transformers.AutoModel.from_pretrained(backbone).parameters())
    assert ours.bytes["networks that losses look through"] == pytest.approx(4 * held, rel=0.01)
    assert 0 < ours.forward_gflop["discriminator"] < ours.step_gflop and ours.parameters["discriminator"] < held
    assert Config(backbone="nobody/nothing", layers=(14,), resolution=32).outline().layers == (14,)
    # a hub id whose config is not here counts as the published one: 22 M parameters, 785 tokens
    part = settings.discriminator.model_copy(update={"backbone": "nobody/nothing", "resolution": 224})
    theirs = plan(settings.model_copy(update={"discriminator": part}))
    assert theirs.bytes["networks that losses look through"] == pytest.approx(4 * 21.7e6, rel=0.02)
    assert theirs.forward_gflop["discriminator"] > 33
