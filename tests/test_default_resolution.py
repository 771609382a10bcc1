"""The resolution that a command takes where none is given: the VAE's own, the same for all, and said."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_call import call, program
from diffusers import AutoencoderKL
from tiny_classes import tiny

from eval import latent_space, reconstruction
from ldm_vae.autoencoder.geometry import sample_size
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.latent_store.format.manifest import read_manifest

PROGRAMS = {"evaluate": reconstruction, "latent_space": latent_space}
CHEAP = ("--batch_size", "4", "--num_workers", "0")
FEW = ("--max_images", "3", "--bank", "2", "--likelihood_images", "0", "--components", "0", "--pairs", "0")


def test_a_config_says_it_and_diffusers_own_default_does_not(tiny_vae_folder: Path) -> None:
    config = tiny_vae_folder / "config.json"
    said = json.loads(config.read_text())
    for sample, taken in ((48, 48), (49, 48), (2048, 1024), (1, 2), ([96, 64], 64)):
        config.write_text(json.dumps(said | {"sample_size": sample}))
        assert sample_size(load_autoencoder(tiny_vae_folder)) == taken
    del said["sample_size"]  # diffusers fills in 32
    config.write_text(json.dumps(said))
    assert load_autoencoder(tiny_vae_folder).config.sample_size == 32
    assert sample_size(load_autoencoder(tiny_vae_folder)) == 512


def test_a_class_without_the_key_or_of_one_size() -> None:
    assert sample_size(tiny("AutoencoderDC")) == 512
    assert sample_size(tiny("AutoencoderRAE")) == 32


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--metrics", "psnr", "--pictures", "0"),
        ("latent_space", "--repeats", "2", *FEW),
        ("drift", "--images", "3", "--no_lpips"),
        ("encode",),
        ("export",),
    ],
    ids=lambda words: words[0],
)
def test_every_command_takes_the_same_and_says_so(
    words: Sequence[str],
    tiny_vae: AutoencoderKL,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_vae.register_to_config(sample_size=24)
    vae, out, (verb, *rest) = tmp_path / "vae", tmp_path / "out", words
    tiny_vae.save_pretrained(vae)
    if verb in PROGRAMS:
        program(PROGRAMS[verb], vae, image_folder, "--output", out, *CHEAP, *rest)
        (result,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
        assert result["data"]["resolution"] == 24
    elif verb == "encode":
        call("encode", vae, image_folder, out, *CHEAP)
        assert read_manifest(out).identity.resolution == (24,)
    elif verb == "drift":
        call("drift", vae, vae, image_folder, "--json", *rest)
        asked = capsys.readouterr()
        call("drift", vae, vae, image_folder, "--json", *rest, "--resolution", 24)
        assert capsys.readouterr() == (asked.out, "")
        print(asked.err, file=sys.stderr)
    else:
        call("export", vae, out, "--stats", image_folder)
        asked = capsys.readouterr()
        call("export", vae, tmp_path / "same", "--stats", image_folder, "--resolution", 24)
        scales = [json.loads((one / "config.json").read_text())["scaling_factor"] for one in (out, tmp_path / "same")]
        assert scales[0] == scales[1]
        print(asked.err, file=sys.stderr)
    said = capsys.readouterr().err.splitlines()
    assert said.count(f"note: resolution: 24 px, by VAE {vae}; --resolution sets another") == 1
