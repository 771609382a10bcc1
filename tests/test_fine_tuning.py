"""Fine-tuning: what is frozen stays bit for bit, and another number of channels starts from what the base could do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_images
from diffusers import AutoencoderKL
from forked import Finished, fork
from torch import nn

from ldm_vae.autoencoder import AutoencoderConfig, TrainableAutoencoder, load_autoencoder
from ldm_vae.errors import UsageError
from ldm_vae.fine_tuning import encoder_learns, resize_channels, set_trainable
from train import autoencoder as training_program

SHAPE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def learns(vae: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in vae.named_parameters() if parameter.requires_grad}


def test_patterns_freeze_and_unfreeze_in_their_order(tiny_vae: AutoencoderKL) -> None:
    set_trainable(tiny_vae, ["decoder.*", "post_quant_conv.*"])
    assert learns(tiny_vae) == {"decoder", "post_quant_conv"} and not encoder_learns(tiny_vae)
    set_trainable(tiny_vae, ["*", "!decoder.*", "decoder.conv_out.bias"])
    assert learns(tiny_vae) == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    assert not tiny_vae.decoder.conv_out.weight.requires_grad and tiny_vae.decoder.conv_out.bias.requires_grad


def test_a_pattern_that_names_nothing_is_refused(tiny_vae: AutoencoderKL) -> None:
    with pytest.raises(UsageError, match=r"trainable: `decodr\.\*` matches none of the \d+ parameters, e\.g\. decoder"):
        set_trainable(tiny_vae, ["decodr.*"])
    with pytest.raises(UsageError, match="leaves no parameter to learn"):
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


def test_latent_channels_change_only_when_asked(tiny_vae_folder: Path, tmp_path: Path) -> None:
    refused = tune(tmp_path, tiny_vae_folder, model=SHAPE | {"latent_channels": 6})
    assert refused.returncode == 2
    assert "model.latent_channels: the config says 6" in refused.stderr and "ignore_mismatched_sizes" in refused.stderr
    done = tune(tmp_path, tiny_vae_folder, model=SHAPE | {"latent_channels": 6}, ignore_mismatched_sizes=True)
    assert done.returncode == 0, done.stderr
    assert load_autoencoder(tmp_path / "run").config.latent_channels == 6
