"""NaN and infinity in a network: one sentence that names the tensor or the layer, from every verb that loads one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from repository import ROOT
from sentences import refused

from ldm_vae import cli
from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import write_store

POISONED = "decoder.mid_block.resnets.0.conv1.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("single_file", [False, True])
def test_whichever_tensor_holds_it_is_named(
    value: float, single_file: bool, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    names = list(tiny_vae.state_dict())
    for name in (names[0], "quant_conv.weight", "decoder.conv_norm_out.bias", names[-1]):
        weights = {key: tensor.clone() for key, tensor in tiny_vae.state_dict().items()}
        weights[name].flatten()[-1] = value
        tiny_vae.load_state_dict(weights)
        tiny_vae.save_pretrained(tmp_path / name)
        source, config = tmp_path / name, None
        if single_file:
            source, config = next((tmp_path / name).glob("*.safetensors")), tmp_path / name
        with refused(UsageError, name):
            load_autoencoder(source, config)
        weights[name].flatten()[-1] = 0.5
        tiny_vae.load_state_dict(weights)


def test_large_finite_weights_are_no_infinity(tiny_vae: AutoencoderKL) -> None:
    """Their sum overflows; each of them does not."""
    with torch.no_grad():
        tiny_vae.decoder.conv_out.weight.fill_(3e38)
    finite.check_weights(tiny_vae, "VAE")
    with torch.no_grad():
        tiny_vae.decoder.conv_out.weight[0, 0, 0, 0] = float("inf")
    with refused(UsageError, "decoder.conv_out.weight"):
        finite.check_weights(tiny_vae, "VAE")


# --- the verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tiny_vae: AutoencoderKL, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """A sound VAE, one with NaN, ones whose encoder and decoder overflow, images, and a store of the sound one."""
    write_store(tiny_vae, open_source(image_folder), tmp_path / "store", resolution=16, vae_name=str(tiny_vae_folder))
    found = {"sound": tiny_vae_folder, "images": image_folder, "store": tmp_path / "store", "out": tmp_path / "out"}
    sound = {key: tensor.clone() for key, tensor in tiny_vae.state_dict().items()}
    changes = {"nan": (POISONED, float("nan")), "encoder": ("encoder.conv_out.weight", 3e38),
               "decoder": ("decoder.conv_out.weight", 3e38)}  # fmt: skip
    for kind, (name, value) in changes.items():
        tiny_vae.load_state_dict(sound | {name: torch.full_like(sound[name], value)})
        tiny_vae.save_pretrained(tmp_path / f"vae_{kind}")
        found[kind] = tmp_path / f"vae_{kind}"
    return found


Call = Callable[[dict[str, Path], Path], list[Any]]
CHEAP = ["--resolution", 16]
VERBS: dict[str, Call] = {
    "encode": lambda at, vae: ["encode", vae, at["images"], at["out"], *CHEAP, "--num_workers", 0],
    "evaluate": lambda at, vae: [
        "evaluate", vae, at["images"], "--output", at["out"], *CHEAP, "--metrics", "psnr", "--num_workers", 0,
    ],
    "reconstruct": lambda at, vae: ["reconstruct", vae, at["images"] / "img_0000.png", at["out"]],
    "decode": lambda at, vae: ["decode", at["store"], at["out"], "--vae", vae, "--count", 2],
    "export": lambda at, vae: ["export", vae, at["out"], "--stats", at["images"], *CHEAP],
    "latent_space": lambda at, vae: [
        "latent_space", vae, at["images"], "--output", at["out"], *CHEAP, "--num_workers", 0,
    ],
    "drift": lambda at, vae: ["drift", at["sound"], vae, at["images"], *CHEAP, "--no_lpips"],
    "tiling": lambda at, vae: ["tiling", vae, at["images"] / "img_0000.png", "--tile", 16, "--overlap", 0.5],
    "probe": lambda at, vae: ["probe", vae, at["images"], "--output", at["out"], *CHEAP],
}  # fmt: skip
ONLY_LOADED: dict[str, Call] = {
    "fp16": lambda at, vae: ["fp16", "audit", vae, "--resolution", 16],
    "plain export": lambda at, vae: ["export", vae, at["out"]],
    "train": lambda at, vae: ["train", _config(at, vae)],
}


def _config(at: dict[str, Path], vae: Path) -> Path:
    shape = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    settings |= {"data": {"kind": "folder", "path": str(at["images"])}, "output_dir": str(at["out"])}
    settings |= {"init": "noise", "init_from": str(vae), "model": {"kind": "kl", **shape}, "validation_data": None}
    path = at["out"].with_name("config.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def exit_of(monkeypatch: pytest.MonkeyPatch, words: list[Any]) -> int:
    monkeypatch.setattr(sys, "argv", ["ldm-vae", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.mark.parametrize("verb", [*VERBS, *ONLY_LOADED])
def test_every_verb_names_the_tensor(
    verb: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(monkeypatch, (VERBS | ONLY_LOADED)[verb](places, places["nan"])) == 2
    error = capsys.readouterr().err
    assert POISONED in error and "Traceback" not in error


HALVES = [(verb, half) for verb in VERBS for half in ("encoder", "decoder")]
NOT_RUN = {("decode", "encoder"), ("export", "decoder"), ("probe", "encoder"), ("probe", "decoder")}  # probe: too slow


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "half"), [case for case in HALVES if case not in NOT_RUN])
def test_every_verb_names_the_layer_of_finite_weights(
    verb: str, half: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = exit_of(monkeypatch, VERBS[verb](places, places[half]))
    out, error = capsys.readouterr()
    assert status == 1 and "Traceback" not in error, out
    if (verb, half) == ("encode", "encoder"):  # each image by itself, with its reason in quarantine.jsonl
        assert "NaN or infinity" in error
    else:
        assert f"{half}.conv_out" in error
    assert not (places["out"] / "metrics.json").exists()


def test_a_sound_network_computes_as_before(tiny_vae: AutoencoderKL) -> None:
    from ldm_vae.autoencoder import latents

    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        moments = finite.encode(tiny_vae, pixels)
        assert torch.equal(moments.mean, latents.encode(tiny_vae, pixels).mean)
        assert torch.equal(finite.decode(tiny_vae, moments.mean), latents.decode(tiny_vae, moments.mean))


def test_the_image_is_named(tiny_vae: AutoencoderKL) -> None:
    pixels = torch.zeros(3, 3, 16, 16)
    pixels[1] = 3e38
    with torch.no_grad(), pytest.raises(WorkError, match=r"encoder\..* b,"):  # the layer is the machine's
        finite.encode(tiny_vae, pixels, ["a", "b", "c"])


def test_what_was_not_finite_before_is_not_the_networks_fault(tiny_vae: AutoencoderKL) -> None:
    with torch.no_grad(), refused(WorkError, "b"):
        finite.decode(tiny_vae, torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1).expand(2, 4, 8, 8), ["a", "b"])
