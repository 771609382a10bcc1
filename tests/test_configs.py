"""Every shipped config: its header says how to run it, what it costs and what to expect, and it builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ldm_vae import config
from ldm_vae.autoencoder import check_resolution, count_parameters, downsampling_factor
from ldm_vae.training import Training, build_discriminator

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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
    with torch.device("meta"):
        vae = settings.model.build()
        critic = build_discriminator(settings)
    check_resolution(settings.resolution, downsampling_factor(vae))
    assert (critic is not None) == settings.adversary.enabled
    factor, channels = (
        re.match(r"kl_f(\d+)_d(\d+)", path.stem).groups() if path.stem.startswith("kl_") else (None, None)
    )
    if factor:
        assert downsampling_factor(vae) == int(factor)
        assert vae.config.latent_channels == int(channels)
    if path.stem == "kl_f8_d4":
        assert count_parameters(vae.parameters()) == 83_653_863  # Stable Diffusion's


def test_the_named_configs_exist() -> None:
    named = {"kl_f4_d3", "kl_f8_d4", "kl_f8_d16", "kl_f16_d16", "kl_f32_d64", "smoke", "demo"}
    named |= {"finetune_decoder_sd", "finetune_decoder_sd_8gb", "finetune_sdxl", "finetune_flux"}
    assert named <= {path.stem for path in CONFIGS}
