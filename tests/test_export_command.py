"""`ldm-vae export` as a user calls it: what is written, said and refused."""

from __future__ import annotations

import functools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file
from tiny_networks import to_ldm

from ldm_vae.autoencoder.config import AutoencoderConfig, block_types
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.weights.ldm_keys import to_ldm_name
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.targets import TARGETS, warnings_for, warnings_for_pipelines, write_target
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.models.flux2 import Config as Flux2Config
from ldm_vae.perceptual import features
from ldm_vae.perceptual.pretrained import load_lpips


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_measured_over_images_then_another_kind_without_measuring_again(
    tiny_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    call = ("export", tiny_vae_folder, out, "--stats", image_folder, "--resolution", 32)
    assert run_cli(*call) == 0
    printed = capsys.readouterr().out
    assert "95 % interval" in printed and "12 images" in printed and "equal to the bit" in printed
    scale = config_of(out)["scaling_factor"]
    assert scale not in (1.0, 0.18215) and config_of(out)["sample_size"] == 32
    assert "| scaling_factor |" in (out / "README.md").read_text()
    # the statistics travelled with the folder
    assert run_cli("export", out, tmp_path / "channel", "--normalisation", "channel") == 0
    config = config_of(tmp_path / "channel")
    assert config["scaling_factor"] == 1.0 and config["shift_factor"] is None and len(config["latents_std"]) == 4
    # and back, to the same number
    assert run_cli("export", tmp_path / "channel", out, "--normalisation", "scale") == 0
    assert config_of(out)["scaling_factor"] == pytest.approx(scale, rel=1e-12)


def test_a_batch_norm_that_nobody_has_measured_is_said(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"block_out_channels": (4, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    Flux2Config(**shape).build().save_pretrained(tmp_path / "vae")
    said = "the batch norm is an identity, not measured"
    assert run_cli("export", tmp_path / "vae", tmp_path / "out") == 0
    assert said in "".join(capsys.readouterr())
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--stats", image_folder, "--resolution", 32) == 0
    assert said not in "".join(capsys.readouterr())
    assert load_autoencoder(tmp_path / "out").bn.running_mean.any()


def test_sd_scaling_is_not_left_in_another_model(
    tiny_vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae.register_to_config(scaling_factor=0.18215)
    tiny_vae.save_pretrained(tmp_path / "vae")
    assert run_cli("export", tmp_path / "vae", tmp_path / "out") == 2
    assert "--stats" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bases_normalisation_is_kept(
    tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)  # SD3's
    tiny_vae.save_pretrained(tmp_path / "base")
    tiny_vae.register_to_config(scaling_factor=0.7, shift_factor=None)
    tiny_vae.save_pretrained(tmp_path / "tuned")
    call = ("export", tmp_path / "tuned", tmp_path / "out", "--normalisation_from")
    stats = ("--stats", image_folder, "--resolution", 32)
    assert run_cli(*call, tmp_path / "base", *stats) == 0
    config = config_of(tmp_path / "out")
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609)
    assert f"as {tmp_path / 'base'} has it" in capsys.readouterr().out
    assert "Measured in fp64 over 12 images" in (tmp_path / "out" / "README.md").read_text()
    assert run_cli(*call, tmp_path / "base", "--normalisation", "scale") == 2
    assert "--normalisation_from names the kind already" in capsys.readouterr().err
    AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=8).build().save_pretrained(
        tmp_path / "other"
    )
    assert run_cli(*call, tmp_path / "other") == 2
    assert "it has 8 latent channels, this VAE 4" in capsys.readouterr().err
    assert run_cli(*call, tmp_path / "nothing") == 2


def tuned(vae: AutoencoderKL, base: Path, run: Path) -> None:
    """RUN as a training with `normalisation_from: BASE` leaves it; BASE has a scaling_factor of 0.5."""
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(base)
    statistics = LatentStatistics()
    statistics.update(Moments(torch.randn(9, 4, 8, 8), torch.zeros(9, 4, 8, 8)))
    write_vae(vae, run / "vae", Normalisation(0.5), statistics=statistics)
    (run / "config.yaml").write_text(f"normalisation_from: {base}\n")


@pytest.mark.parametrize("source", ["run", "run/vae", "exported", "fixed"])
def test_statistics_do_not_undo_the_normalisation_of_a_runs_base(
    source: str, tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(tiny_vae, tmp_path / "base", tmp_path / "run")
    stats = ("--stats", image_folder, "--resolution", 32)
    if source == "exported":
        assert run_cli("export", tmp_path / "run", tmp_path / source, *stats) == 0
    if source == "fixed":
        assert run_cli("fp16", "fix", tmp_path / "run", tmp_path / source, image_folder, "--resolution", 32) == 0
    capsys.readouterr()
    for more in ((), stats):
        assert run_cli("export", tmp_path / source, tmp_path / "out", *more) == 0
        assert config_of(tmp_path / "out")["scaling_factor"] == 0.5
        said = capsys.readouterr().out
        (written,) = re.findall("^normalisation.*", said, flags=re.MULTILINE)
        (compared,) = re.findall("^not written.*", said, flags=re.MULTILINE)
        assert "scaling_factor 0.5, as SRC has it" in written and "interval" not in written
        assert "95 % interval" in compared and f"over {12 if more or source == 'exported' else 9} images" in compared
        assert (str(tmp_path / "base") in written) == (source == "run" and bool(more))
        card = (tmp_path / "out" / "README.md").read_text()
        assert "scaling_factor: 0.5" in card and "given, not measured" in card and "Compatibility" not in card
    # by its name another one is written, and said to be one
    assert run_cli("export", tmp_path / source, tmp_path / "out", *stats, "--normalisation", "scale") == 0
    said = capsys.readouterr().out
    assert "incompatible with diffusion models" in said and "scaling_factor 0.5;" in said
    assert "not written" not in said and "interval" in said
    assert config_of(tmp_path / "out")["scaling_factor"] not in (0.5, 1.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Compatibility" in card and "given, not measured" not in card


def test_a_foreign_normalisation_that_is_measured_anew_is_said(
    tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = ("--stats", image_folder, "--resolution", 32)
    for scale, known in ((0.5, True), (1.0, False), (0.18215, False)):  # the last two are nobody's, in this shape
        tiny_vae.register_to_config(scaling_factor=scale)
        tiny_vae.save_pretrained(tmp_path / "vae")
        assert run_cli("export", tmp_path / "vae", tmp_path / "out", *stats) == 0
        assert ("incompatible with diffusion models" in capsys.readouterr().out) == known
        assert config_of(tmp_path / "out")["scaling_factor"] != scale
    # measured here before: other images give another number of the same VAE's own
    assert run_cli("export", tmp_path / "out", tmp_path / "again", *stats, "--stats_images", 6) == 0
    assert "incompatible" not in capsys.readouterr().out
    assert config_of(tmp_path / "again") != config_of(tmp_path / "out")


def test_a_distilled_network_keeps_the_normalisation_of_its_teacher(image_folder: Path, tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    stats = ("--stats", image_folder, "--resolution", 32)
    assert run_cli("export", tmp_path / "tiny", tmp_path / "out", *stats) == 0
    assert config_of(tmp_path / "out")["scaling_factor"] == 1.0


def test_a_kind_that_was_not_measured_is_refused(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", tiny_vae_folder, tmp_path / "out", "--normalisation", "shift") == 2
    assert "--stats" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["as SRC has it", "--target", "--normalisation_from", "encode", "convert", "fp16 fix"])
def test_a_config_by_which_nobody_can_divide_is_refused_by_every_verb(
    verb: str, tiny_vae: AutoencoderKL, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    vae, out = tmp_path / "vae", tmp_path / "out"
    images = ("--resolution", 32)
    np.savez(tmp_path / "0.npz", latents=np.ones((4, 8, 8), np.float32))
    call: dict[str, tuple[object, ...]] = {
        "as SRC has it": ("export", vae, out),
        "--target": ("export", vae, out, "--target", "comfyui"),
        "--normalisation_from": ("export", tiny_vae_folder, out, "--normalisation_from", vae),
        "encode": ("encode", vae, image_folder, out, *images),
        "convert": ("store", "convert", tmp_path, out, "--from", "kohya", "--vae", vae),
        "fp16 fix": ("fp16", "fix", vae, out, *images),
    }
    for value in (0.0, -0.5):
        tiny_vae.register_to_config(scaling_factor=value)
        tiny_vae.save_pretrained(vae)
        assert run_cli(*call[verb]) == 2
        said = capsys.readouterr().err
        assert "scaling_factor: expected" in said and "--stats" in said and "Traceback" not in said
        assert not out.exists()


def test_a_config_by_which_nobody_can_divide_is_measured_anew(
    tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path
) -> None:
    tiny_vae.register_to_config(scaling_factor=0.0)
    tiny_vae.save_pretrained(tmp_path / "vae")
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--stats", image_folder, "--resolution", 32) == 0
    assert config_of(tmp_path / "out")["scaling_factor"] > 0  # type: ignore[operator]


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"single_file"}))
def test_single_file_is_written_with_its_warnings(
    target: str,
    tiny_vae_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.safetensors"
    call = ("export", tiny_vae_folder, path, "--target", target)
    assert run_cli(*call) == 0
    warned = capsys.readouterr().err
    assert "cannot load this file" in warned and "ignores the normalisation" in warned
    assert "cannot load this file" in path.with_suffix(".md").read_text()
    assert "decoder.mid.attn_1.proj_out.weight" in load_file(path)
    assert run_cli(*call, "--strict") == 1
    # and back, without being told the shape
    assert run_cli("export", path, tmp_path / "back") == 0
    one, other = load_autoencoder(tiny_vae_folder).state_dict(), load_autoencoder(tmp_path / "back").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    # a folder as OUT holds the file and the card
    assert run_cli("export", tiny_vae_folder, tmp_path / "mine", "--target", target) == 0
    assert sorted(entry.name for entry in (tmp_path / "mine").iterdir()) == ["README.md", "mine.safetensors"]


def test_half_precision_file(tiny_vae_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    assert run_cli("export", tiny_vae_folder, path, "--target", "kohya", "--variant", "fp16") == 0
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    full = load_autoencoder(tiny_vae_folder).state_dict()
    assert all(
        torch.equal(value, full[name].half().float()) for name, value in load_autoencoder(path).state_dict().items()
    )


def test_a_file_of_wrong_names_is_caught(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_target(tiny_vae, tmp_path / "right.safetensors") < 1e-5

    def swapped(name: str, blocks: int) -> str:  # every name is there, two blocks have changed places
        return re.sub(r"block_([12])", lambda match: f"block_{3 - int(match[1])}", to_ldm_name(name, blocks))

    monkeypatch.setattr("ldm_vae.autoencoder.weights.ldm_keys.to_ldm_name", swapped)
    with pytest.raises(WorkError, match=r"wrong\.safetensors"):  # and by how much, so not golden
        write_target(tiny_vae, tmp_path / "wrong.safetensors")
    assert not (tmp_path / "wrong.safetensors").exists()


SD = AutoencoderConfig().shape() | {"out_channels": 3, "scaling_factor": 0.18215}


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("comfyui", {}, []),
        ("kohya", {"scaling_factor": 0.13025}, []),
        ("a1111", {}, []),
        ("comfyui", {"scaling_factor": 0.5}, ["ignores the normalisation"]),
        ("comfyui", {"latent_channels": 64}, ["another network", "ignores"]),
        ("comfyui", {"block_out_channels": (128, 256, 512), "latent_channels": 3}, ["ignores"]),
        ("comfyui", {"norm_num_groups": 16}, ["32 groups"]),
        ("comfyui", block_types((3,), 4), ["middle block only"]),
        ("kohya", block_types((3,), 4), ["neither"]),
        ("a1111", block_types((3,), 4), ["not that of SD"]),
        ("comfyui", {"latent_channels": 32}, ["0.3.72", "ignores"]),
        ("comfyui", {"latent_channels": 32, "norm_num_groups": 16}, ["32 groups", "ignores"]),  # no version
        ("a1111", {"latent_channels": 32}, ["not that of SD", "ignores"]),
        ("kohya", {"latent_channels": 16}, ["neither", "ignores"]),
        (
            "kohya",
            {
                "latent_channels": 16,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
            },
            [],
        ),
        ("a1111", {"mid_block_add_attention": False}, ["not that of SD"]),
    ],
)
def test_what_each_target_takes(target: str, changes: dict[str, object], words: list[str]) -> None:
    found = warnings_for(TARGETS[target], SD | changes)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


@pytest.mark.parametrize("channels", [3, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["scale", "shift", "channel"])
def test_a_shift_is_warned_of_where_the_pipelines_ignore_it(kind: str, channels: int) -> None:
    """SD's and SDXL's, which take 4 channels, know no shift_factor (test_export_consumers holds their own lines); SD3's
    and FLUX's, of 16, do; other latents have no pipeline that is known."""
    shift = {"shift_factor": 0.5} if kind == "shift" else {}
    mean = {"latents_mean": [0.5] * channels, "latents_std": [1.0] * channels} if kind == "channel" else {}
    found = warnings_for_pipelines(SD | {"latent_channels": channels} | shift | mean)
    assert len(found) == (kind == "shift" and channels == 4)
    assert all("shift_factor" in sentence and "SDXL" in sentence for sentence in found)
    assert warnings_for_pipelines(SD | {"latent_channels": channels, "shift_factor": 0.0}) == []  # AutoencoderTiny's


def test_an_ignored_shift_is_said_at_the_export_and_counts_for_strict(
    tiny_vae: AutoencoderKL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae.register_to_config(scaling_factor=0.7, shift_factor=0.25)
    tiny_vae.save_pretrained(tmp_path / "vae")
    call = ("export", tmp_path / "vae", tmp_path / "out", "--normalisation", "shift")
    assert run_cli(*call) == 0
    said = capsys.readouterr().err
    assert "shift_factor" in said and "0.25" in said
    assert config_of(tmp_path / "out")["shift_factor"] == 0.25
    assert run_cli(*call, "--strict") == 1


def test_an_old_pickle_is_read_with_its_flag_and_said_so(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": to_ldm(tiny_vae.state_dict(), 2)}, tmp_path / "old.ckpt")
    call = ("export", tmp_path / "old.ckpt", tmp_path / "out", "--config", tiny_vae_folder)
    assert run_cli(*call) == 2
    assert "--weights_only_pickle" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run_cli(*call, "--weights_only_pickle") == 0
    assert "as a pickle, with weights_only" in capsys.readouterr().out
    loaded = load_autoencoder(tmp_path / "out").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tiny_vae.state_dict().items())


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("was-run"),)  # type: ignore[return-value]


def pickles(folder: Path) -> dict[str, Path]:
    """Files that torch refuses to load as tensors alone, each with its advice to turn that off."""
    files = {what: folder / f"{what}.pt" for what in ("runs", "bare", "garbage", "numpy", "cut")}
    torch.save({"state_dict": Runs()}, files["runs"])
    files["bare"].write_bytes(pickle.dumps({"state_dict": Runs()}))
    files["garbage"].write_bytes(b"garbage" * 10)
    torch.save({"state_dict": np.float64(3)}, files["numpy"])
    files["cut"].write_bytes(files["numpy"].read_bytes()[:-40])
    return files


@pytest.mark.parametrize("what", ["runs", "bare", "garbage", "numpy", "cut"])
@pytest.mark.parametrize("reader", ["export", "lpips", "inception"])
def test_no_refusal_repeats_the_advice_to_run_a_pickle(
    reader: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = pickles(tmp_path)[what]
    if reader == "export":
        assert run_cli("export", file, tmp_path / "out", "--weights_only_pickle") == 2
        said = capsys.readouterr().err
    else:
        inception = functools.partial(features.inception, file, torch.device("cpu"), sha256="")
        read = functools.partial(load_lpips, "alex", str(file)) if reader == "lpips" else inception
        with pytest.raises((UsageError, WorkError)) as refused:
            read()
        said = str(refused.value)
    assert str(file) in said and "\n" not in said.strip() and "Traceback" not in said
    for advice in (
        "weights_only=False",
        "weights_only` set to",
        "you have two options",
        "add_safe_globals",
        "allowlist",
    ):
        assert advice not in said
    assert not (tmp_path / "was-run").exists()
