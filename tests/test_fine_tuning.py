"""Fine-tuning: what is frozen stays bit for bit, and another number of channels starts from what the base could do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from fork_server import Finished, fork
from images import write_images
from sentences import refused
from tiny_networks import SHAPE
from torch import nn
from torch._dynamo.utils import counters

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fine_tuning import encoder_learns, resize_channels, set_trainable
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.models.vq import Config as VQConfig
from train import autoencoder as training_program


def learns(vae: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in vae.named_parameters() if parameter.requires_grad}


def test_patterns_freeze_and_unfreeze_in_their_order(tiny_vae: AutoencoderKL) -> None:
    set_trainable(tiny_vae, ["decoder.*", "post_quant_conv.*"])
    assert learns(tiny_vae) == {"decoder", "post_quant_conv"} and not encoder_learns(tiny_vae)
    set_trainable(tiny_vae, ["*", "!decoder.*", "decoder.conv_out.bias"])
    assert learns(tiny_vae) == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    assert not tiny_vae.decoder.conv_out.weight.requires_grad and tiny_vae.decoder.conv_out.bias.requires_grad


def test_a_pattern_that_names_nothing_is_refused(tiny_vae: AutoencoderKL) -> None:
    with refused(UsageError, "trainable"):
        set_trainable(tiny_vae, ["decodr.*"])
    with refused(UsageError, "trainable"):
        set_trainable(tiny_vae, ["*", "!*"])


def test_a_frozen_encoder_has_no_graph(tiny_vae: AutoencoderKL) -> None:
    set_trainable(tiny_vae, ["decoder.*", "post_quant_conv.*"])
    reconstruction = TrainableAutoencoder(tiny_vae)(torch.rand(1, 3, 8, 8), torch.randn(1, 4, 4, 4))
    assert not reconstruction.latents.requires_grad and reconstruction.pixels.requires_grad
    set_trainable(tiny_vae, ["*"])
    assert TrainableAutoencoder(tiny_vae)(torch.rand(1, 3, 8, 8), torch.randn(1, 4, 4, 4)).latents.requires_grad


# --- another number of channels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_conv", [True, False])
def test_more_latent_channels_start_as_the_base(quant_conv: bool) -> None:
    def build(channels: int) -> AutoencoderKL:
        shape = AutoencoderConfig(latent_channels=channels, use_quant_conv=quant_conv, use_post_quant_conv=quant_conv,
                                  **SHAPE)  # fmt: skip
        return shape.build().eval()

    torch.manual_seed(0)
    base, images = build(4), torch.rand(2, 3, 16, 16) * 2 - 1
    larger = resize_channels(base, build(6))
    with torch.no_grad():
        ours, theirs = larger.encode(images).latent_dist, base.encode(images).latent_dist
        torch.testing.assert_close(ours.mean[:, :4], theirs.mean)
        torch.testing.assert_close(ours.logvar[:, :4], theirs.logvar)
        assert ours.mean[:, 4:].abs().max() > 0
        decoded = larger.decode(ours.mean).sample
        torch.testing.assert_close(decoded, base.decode(theirs.mean).sample)
        smaller = resize_channels(base, build(3)).encode(images).latent_dist
        if not quant_conv:  # with one, each moment also read the channels that are gone
            torch.testing.assert_close(smaller.mean, theirs.mean[:, :3])
            torch.testing.assert_close(smaller.logvar, theirs.logvar[:, :3])


def test_more_channels_of_codes_start_as_the_base() -> None:
    base, larger = (
        VQConfig(latent_channels=channels, num_vq_embeddings=8, **SHAPE).build().eval() for channels in (4, 6)
    )
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = base.encode(images).latents
        torch.testing.assert_close(resize_channels(base, larger).encode(images).latents[:, :4], expected)


def test_another_number_of_image_channels_keeps_the_kernels() -> None:
    base, fresh = (AutoencoderConfig(in_channels=channels, **SHAPE).build() for channels in (3, 5))
    resized = resize_channels(base, fresh).state_dict()
    before = base.state_dict()
    assert torch.equal(resized["encoder.conv_in.weight"][:, :3], before["encoder.conv_in.weight"])
    assert not resized["encoder.conv_in.weight"][:, 3:].any()
    assert torch.equal(resized["decoder.conv_out.weight"][:3], before["decoder.conv_out.weight"])
    assert resized["decoder.conv_out.weight"][3:].any()


# --- through the real program -----------------------------------------------------------------------------------------


def tune(folder: Path, base: Path, **changes: object) -> Finished:
    settings: dict[str, object] = {
        "output_dir": str(folder / "run"),
        "init_from": str(base),
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_images": 8,
        "learning_rate": 1e-2,
        "dataloader_num_workers": 0,
        "model": SHAPE,
        "losses": {"l1": {"weight": 1.0}, "kl": {"weight": 1e-6}},
        "data": {"kind": "folder", "path": str(write_images(folder / "images", 4))},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | changes))
    return fork(training_program.main, [str(folder / "config.yaml")]).wait()


def test_decoder_only_leaves_every_bit_of_the_encoder(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    done = tune(tmp_path, tiny_vae_folder, trainable=["decoder.*", "post_quant_conv.*"])
    assert done.returncode == 0, done.stderr
    assert "the encoder is unchanged" in done.stdout
    before, after = tiny_vae.state_dict(), load_autoencoder(tmp_path / "run").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_tuned_decoder_keeps_the_normalisation_of_its_base(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    tiny_vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    tiny_vae.save_pretrained(tiny_vae_folder)
    only_decoder = {"trainable": ["decoder.*", "post_quant_conv.*"], "normalisation_from": str(tiny_vae_folder)}
    done = tune(tmp_path, tiny_vae_folder, **only_decoder)
    assert done.returncode == 0, done.stderr
    config = load_autoencoder(tmp_path / "run").config
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    (tmp_path / "wrong").mkdir()
    refused = tune(tmp_path / "wrong", tiny_vae_folder, normalisation_from="no/such/base/here")
    assert refused.returncode == 2 and not (tmp_path / "wrong" / "run").exists(), refused.stderr


def test_a_frozen_encoder_keeps_the_normalisation_unless_another_is_named(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    tiny_vae.register_to_config(scaling_factor=0.5)
    tiny_vae.save_pretrained(tiny_vae_folder)
    for name, kept, knobs in (
        ("decoder", True, {"trainable": ["decoder.*"]}),
        ("by_name", False, {"trainable": ["decoder.*"], "normalisation": "scale"}),
        ("encoder", False, {}),
    ):
        (tmp_path / name).mkdir()
        done = tune(tmp_path / name, tiny_vae_folder, **knobs)
        assert done.returncode == 0, done.stderr
        assert (load_autoencoder(tmp_path / name / "run").config.scaling_factor == 0.5) == kept, name
        assert (f"--normalisation_from {tiny_vae_folder}" in done.stdout) != kept, name


def test_latent_channels_change_only_when_asked(tiny_vae_folder: Path, tmp_path: Path) -> None:
    refused = tune(tmp_path, tiny_vae_folder, model=SHAPE | {"latent_channels": 6})
    assert refused.returncode == 2
    assert "model.latent_channels: the config says 6" in refused.stderr and "ignore_mismatched_sizes" in refused.stderr
    done = tune(tmp_path, tiny_vae_folder, model=SHAPE | {"latent_channels": 6}, ignore_mismatched_sizes=True)
    assert done.returncode == 0, done.stderr
    assert load_autoencoder(tmp_path / "run").config.latent_channels == 6


def test_clipping_bounds_what_a_step_moves(tiny_vae_folder: Path, tmp_path: Path) -> None:
    """Adam divides by the gradient's size, but not where its eps is larger: gradients clipped to 1e-12 move nothing."""
    done = tune(tmp_path, tiny_vae_folder, learning_rate=1e-3, max_grad_norm=1e-12, optimizer={"eps": 1e-6})
    assert done.returncode == 0, done.stderr
    before = load_autoencoder(tiny_vae_folder).state_dict()
    after = load_autoencoder(tmp_path / "run").state_dict()
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-7


# --- layout and compiler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"channels_last": True}, marks=pytest.mark.slow),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "channels_last": True}, marks=pytest.mark.slow
        ),
        pytest.param({"gradient_checkpointing": True, "max_grad_norm": 1e6}, marks=pytest.mark.slow),
    ],
    ids=["channels_last", "torch_compile", "gradient_checkpointing"],
)
def test_layout_and_compiler_change_neither_the_result_nor_a_name(tmp_path: Path, knobs: dict[str, object]) -> None:
    critic = {"adversary": {"weight": 0.5}, "discriminator": {"kind": "patchgan", "width": 8, "layers": 1}}
    base = AutoencoderConfig(**SHAPE).build()
    base.save_pretrained(tmp_path / "base")
    tuned = []
    for name, changes in (("plain", {}), ("changed", knobs)):
        (tmp_path / name).mkdir()
        done = tune(tmp_path / name, tmp_path / "base", learning_rate=1e-4, **critic, **changes)
        assert done.returncode == 0, done.stderr
        tuned.append(load_autoencoder(tmp_path / name / "run").state_dict())
    plain, changed = tuned
    assert list(plain) == list(changed) == list(base.state_dict())
    checkpoint = next((tmp_path / "changed" / "run" / "checkpoints").iterdir())
    assert "_orig_mod" not in (checkpoint / "state.json").read_text()
    for name, value in plain.items():
        if "to_k.bias" not in name:  # its gradient is zero but for rounding, which Adam divides by itself
            torch.testing.assert_close(changed[name], value, atol=2e-6, rtol=1e-4)


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, tiny_vae_folder: Path) -> None:
    done = tune(tmp_path, tiny_vae_folder, torch_compile=True, torch_compile_backend="inducto")
    assert done.returncode == 2 and "torch_compile_backend: expected one of" in done.stderr


@pytest.mark.slow
def test_the_forward_is_compiled_as_one_graph(tiny_vae: AutoencoderKL) -> None:
    network = TrainableAutoencoder(tiny_vae.train())
    network.compile(backend="eager")  # a graph is what Dynamo traces, whoever compiles it
    counters.clear()
    for _ in range(2):
        network(torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)).pixels.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_launchers_compiler_is_refused(
    tmp_path: Path, tiny_vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    done = tune(tmp_path, tiny_vae_folder)
    assert done.returncode == 2 and "torch_compile: true" in done.stderr


def test_a_pipelines_vae_is_found_in_the_hubs_cache(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some-lab--some-pipeline"
    tiny_vae.save_pretrained(cached / "snapshots" / ("a" * 40) / "vae")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    assert encoder_fingerprint(load_autoencoder("some-lab/some-pipeline")) == encoder_fingerprint(tiny_vae)
    with pytest.raises(UsageError, match="VAE some-lab/other: cannot be loaded"):  # and the hub's words, so not golden
        load_autoencoder("some-lab/other")
