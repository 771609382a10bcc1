"""Every shipped config x every layout: round trips are equal to the bit.

Widths are divided by 8 where tensors are compared on disk (the key map knows names and shapes, not sizes); at full size
names and shapes are compared on the meta device, and the tensors on disk, of all but the widest, in the slow tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from repository import ROOT
from safetensors.torch import load_file, save_file
from sentences import refused
from tiny_networks import to_ldm

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.single_file import load_single_file, save_single_file
from ldm_vae.autoencoder.weights.shape import infer_config
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.targets import TARGETS, warnings_for, write_target
from ldm_vae.training.config import Training

LAYOUTS = ("diffusers", "bare", "first_stage_model.", "vae.", *TARGETS)


def model_of(path: Path) -> AutoencoderConfig:
    return config.load(Training, path).model


def shapes() -> list[Path]:
    """The configs of KL autoencoders, one for each shape (fine-tunes have that of their base)."""
    models = {path: model_of(path) for path in sorted((ROOT / "configs").glob("*.yaml"), reverse=True)}
    found = {model.model_dump_json(): path for path, model in models.items() if model.kind == "kl"}
    return sorted(found.values())


CONFIGS = [ROOT / "configs" / f"{name}.yaml" for name in ("kl_f8_d4", "kl_f8_d16")]
CONFIGS += [path for path in shapes() if model_of(path) not in map(model_of, CONFIGS)]
WITHOUT_LEVELS = [path for path in CONFIGS if not model_of(path).attention_levels]  # diffusers' reader leaves them out
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def shape_of(vae: AutoencoderKL) -> AutoencoderConfig:
    attention = [name.startswith("Attn") for name in vae.config.down_block_types]
    shape = {name: vae.config[name] for name in AutoencoderConfig().shape() if name in AutoencoderConfig.model_fields}
    return AutoencoderConfig(**shape, attention_levels=[level for level, attends in enumerate(attention) if attends])


def narrow(model: AutoencoderConfig) -> AutoencoderKL:
    widths = tuple(max(4, width // 8) for width in model.block_out_channels)
    changes = {"block_out_channels": widths, "norm_num_groups": min(4, model.norm_num_groups)}
    torch.manual_seed(0)
    return model.model_copy(update=changes).build().eval()


def write_and_read(vae: AutoencoderKL, layout: str, folder: Path) -> AutoencoderKL:
    path = folder / "vae.safetensors"
    if layout == "diffusers":
        return AutoencoderKL.from_pretrained(write_vae(vae, folder / "vae", Normalisation(0.5)))
    if layout in TARGETS:
        write_target(vae, path, name=layout)
    else:
        save_single_file(vae, path, layout.removeprefix("bare"))
    return load_single_file(path)


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[1:])]
)
@every_config
def test_round_trip(path: Path, layout: str, tmp_path: Path) -> None:
    vae = narrow(model_of(path))
    if layout == "single_file" and path not in WITHOUT_LEVELS:
        with refused(UsageError, "from_single_file does not take"):
            write_and_read(vae, layout, tmp_path)
        return
    back = write_and_read(vae, layout, tmp_path)
    before, after = vae.state_dict(), back.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert shape_of(vae) == shape_of(back)
    assert [*vae.config.up_block_types] == [*back.config.up_block_types]


@pytest.mark.slow
@pytest.mark.parametrize("path", WITHOUT_LEVELS, ids=lambda path: path.stem)
def test_diffusers_own_reader(path: Path, tmp_path: Path) -> None:
    vae = narrow(model_of(path))
    folder = write_vae(vae, tmp_path / "vae", Normalisation(0.5))
    for prefix in ("", "first_stage_model."):
        file = save_single_file(vae, tmp_path / "vae.safetensors", prefix)
        back = AutoencoderKL.from_single_file(str(file), config=str(folder)).state_dict()
        assert all(torch.equal(value, back[name]) for name, value in vae.state_dict().items())


@every_config
def test_at_full_size_the_names_are_a_bijection_and_tell_the_shape(path: Path) -> None:
    model = model_of(path)
    with torch.device("meta"):
        vae = model.build()
    renamed = to_ldm(vae.state_dict(), len(model.block_out_channels))
    assert len(renamed) == len(vae.state_dict())
    if model.norm_num_groups == 32:
        found = infer_config({name: tuple(value.shape) for name, value in renamed.items()}, str(path))
        assert {name: found[name] for name in model.shape()} == model.shape()


def test_what_the_targets_say_to_the_shipped_configs() -> None:
    """The table of docs/export.md."""
    loadable = {}
    for path in CONFIGS:
        with torch.device("meta"):
            vae = model_of(path).build()
        warned = {name: " ".join(warnings_for(target, vae.config)) for name, target in TARGETS.items()}
        loadable[path.stem] = {name for name, sentences in warned.items() if "cannot load" not in sentences}
    assert loadable["kl_f8_d4"] == {"comfyui", "kohya", "a1111", "single_file"}
    assert loadable["kl_f8_d16"] == loadable["kl_f4_d3"] == {"comfyui", "single_file"}
    assert loadable["demo"] == loadable["smoke"] == {"single_file"}
    assert loadable["kl_f16_d16"] == loadable["kl_f32_d64"] == set()


# 3 and 4 levels, with and without quant convs, norms of 32 groups (read without our header) and of others. More levels
# and channels are the same code on more bytes: those go to disk narrow, and their full shapes are inferred above
WIDEST = ("kl_f8_d16", "kl_f16_d16", "kl_f32_d64")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in WIDEST], ids=lambda path: path.stem)
def test_at_full_size_on_disk(path: Path, tmp_path: Path) -> None:
    vae = model_of(path).build().eval()
    assert write_target(vae, tmp_path / "vae.safetensors") < 1e-4
    if vae.config.norm_num_groups == 32:  # as another program would have written it: without our header
        save_file(load_file(tmp_path / "vae.safetensors"), tmp_path / "vae.safetensors")
    back = load_single_file(tmp_path / "vae.safetensors")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in vae.state_dict().items())
    assert back.config.scaling_factor == (0.18215 if path.stem == "kl_f8_d4" else 1.0)
