"""The configuration mechanism: files, includes, overrides, options among several, and what the errors say."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT
from sentences import refused

from ldm_vae.core import config, config_file
from ldm_vae.core.config import (
    Part,
    Section,
    choice,
    choices,
)
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.training.config import Training


class Inner(Section):
    path: str
    """Where."""
    flip: bool = True
    steps: int | None = None


class Outer(Section):
    inner: Inner
    losses: choices("ldm_vae.losses")
    discriminator: choice("ldm_vae.discriminators") | None = None
    rate: float = 1e-4


GOOD = "inner: {path: x}\nlosses: {l1: {weight: 1e-6}, kl: {}}\ndiscriminator: {kind: patchgan, width: 8}\n"


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def refuse(tmp_path: Path, text: str, *flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        config.load(Outer, write(tmp_path, text), flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_into_typed_sections(tmp_path: Path) -> None:
    loaded = config.load(Outer, write(tmp_path, GOOD))
    assert loaded.losses["l1"].weight == 1e-6  # PyYAML reads 1e-6 as a string
    assert loaded.discriminator == PatchGAN(width=8)
    assert loaded.inner.flip is True


def test_overrides_change_only_what_they_name(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    flags = ["--losses.kl.weight", "1e-5", "--inner.no-flip", "--inner.steps", "3", "--rate", "2e-3"]
    changed = config.load(Outer, path, flags)
    assert config.differences(config.load(Outer, path), changed) == {
        "inner.flip": (True, False),
        "inner.steps": (None, 3),
        "losses.kl.weight": (1e-6, 1e-5),
        "rate": (1e-4, 2e-3),
    }


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    loaded = config.load(Outer, write(tmp_path, GOOD), ["--rate", "3e-7"])
    assert config.load(Outer, write(tmp_path, config.dump(loaded), "d.yaml")) == loaded


def test_include_is_merged_below(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    variant = write(tmp_path, "include: base.yaml\nlosses: {kl: {weight: 2}}\n")
    loaded = config.load(Outer, variant)
    assert loaded.losses["kl"].weight == 2 and loaded.losses["l1"].weight == 1e-6


def test_kind_on_the_command_line_replaces_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "from ldm_vae.core.config import Part\nclass Config(Part):\n    depth: int = 2\n", "my_critic.py")
    (tmp_path / "lab").mkdir()
    (tmp_path / "my_critic.py").rename(tmp_path / "lab" / "critic.py")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = config.load(Outer, write(tmp_path, GOOD), ["--discriminator.kind", "lab.critic"])
    assert isinstance(loaded.discriminator, Part)
    assert loaded.discriminator.model_dump() == {"kind": "lab.critic", "depth": 2}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD + "rat: 3\n",
            "`rat`: unknown key, did you mean `rate`; this section has discriminator, inner, losses, rate",
        ),
        (GOOD.replace("path: x", "pth: x"), "`inner.path`: is missing (and 1 more)"),
        (GOOD.replace("kl", "kll"), "`losses.kll`: unknown kind `kll`; ldm_vae.losses has activation_range, "),
        (GOOD.replace("weight", "wait"), "`losses.l1.wait`: unknown key, did you mean `weight`"),
        (GOOD.replace("1e-6", "heavy"), "`losses.l1.weight`: input should be a valid number"),
        (GOOD.replace("kind: patchgan", "kind: no.such"), "`discriminator`: kind `no.such` cannot be imported"),
        (
            GOOD.replace("kind: patchgan, ", ""),
            "`discriminator`: `kind` is missing; expected one of features, patchgan",
        ),
        ("- a\n", "expected a mapping of sections, got list"),
        ("a: b: c\n", "not readable as YAML"),
        ("inner: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_errors_name_the_field_and_what_exists(tmp_path: Path, text: str, says: str) -> None:
    assert says in refuse(tmp_path, text)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lossez.kl.weight", "3"], "unknown option --lossez.kl.weight, did you mean `--losses.kl.weight`"),
        (["--rate", "fast"], "options: --rate: "),
        (["--qqq", "1"], "unknown option --qqq; options are --inner.path"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: list[str], says: str) -> None:
    assert says in refuse(tmp_path, GOOD, *flags)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused(UsageError, "none.yaml"):
        config.load(Outer, tmp_path / "none.yaml")


# --- numbers and flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--seed", "1e3"], "--seed"),
        (["--seed", "9" * 60], "--seed"),
        (["--learning_rate", "inf"], "--learning_rate"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--ema_halflife_images", "-5"], "--ema_halflife_images"),
        (["--resolution", str(2**30)], "--resolution"),
        (["--max_train_images", "9" * 20], "--max_train_images"),
        (["--model.layers_per_block", "1000000000"], "--model.layers_per_block"),
        (["--model.norm_num_groups", "0"], "--model.norm_num_groups"),
        (["--model.block_out_channels", "33"], "--model.block_out_channels"),
        (["--model.block_out_channels", "65536", "65536", "65536"], "--model"),
        (["--model.block_out_channels", "32", "x"], "--model.block_out_channels"),
        (["--optimizer.betas", "0.5", "1"], "--optimizer.betas"),
        (["--gradient_checkpointing", "perhaps"], "--gradient_checkpointing"),
        (["--gradient_chekpointing"], "--gradient_checkpointing"),
        (["--model.kind", "os"], "--model.kind"),
        (["--data.kind", "..os"], "--data.kind"),
        (["--model.kind", "vq", "--model.norm_num_groups", "7"], "--model.norm_num_groups"),
        (["--seed", "1", "--seed", "2"], "--seed"),
        (["--output_dir", "x", "extra"], "--output_dir"),
        (["--losses.l1.weight", "1", "2"], "--losses.l1.weight"),
        (["--adversary.loss", "hinge", "vanilla"], "--adversary.loss"),
        (["--model", "x", "--model.kind", "kl"], "--model"),
        (["--data.path=[", "--seed", "1"], "--data.path"),
        (["extra", "--seed", "1"], "options"),
        (["--model.in_channels", "1"], "model.in_channels"),
        (["--model.attention_levels", "1", "9"], "--model.attention_levels"),
        (["--model.attention_levels", "-1"], "--model.attention_levels"),
    ],
)
def test_a_flag_that_cannot_be_is_one_sentence(flags: list[str], field: str) -> None:
    with refused(UsageError, field):
        config.load(Training, ROOT / "configs" / "smoke.yaml", flags)


@pytest.mark.parametrize("field", ["output_dir", "init_from", "data.path", "trainable"])
def test_text_that_no_system_takes_is_refused(field: str, tmp_path: Path) -> None:
    value = ["*", "\0"] if field == "trainable" else "a\0b"
    tree: dict[str, Any] = {"include": str(ROOT / "configs" / "smoke.yaml")}
    section, _, name = field.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with refused(UsageError, field):
        config.load(Training, tmp_path / "config.yaml", [])


def test_flags_are_what_the_file_could_have_held() -> None:
    def load(*flags: str) -> Training:
        return config.load(Training, ROOT / "configs" / "smoke.yaml", flags)

    for order in (("--data.kind", "zip", "--data.path", "x.zip"), ("--data.path", "x.zip", "--data.kind=zip")):
        assert load(*order).data.model_dump()["path"] == "x.zip"
    for value in (["--gradient-checkpointing"], ["--gradient_checkpointing", "True"], ["--gradient_checkpointing=yes"]):
        assert load(*value).gradient_checkpointing
    assert not load("--gradient_checkpointing", "false").gradient_checkpointing
    assert not load("--transform.no_flip").transform.flip
    for widths in (["16", "32"], ["[16, 32]"]):
        assert load("--model.block_out_channels", *widths).model.model_dump()["block_out_channels"] == (16, 32)
    assert load("--trainable", "decoder.*").trainable == ("decoder.*",)
    assert load("--data.path", "007").data.model_dump()["path"] == "007"
    assert load("--max_grad_norm", "None").max_grad_norm is None
    assert load("--optimizer.betas", "0.9", "0.99").optimizer.betas == (0.9, 0.99)


@pytest.mark.parametrize("body", ["raise RuntimeError('no')", "raise SystemExit(0)", "import sys; sys.exit()", "1 / 0"])
def test_a_module_that_fails_at_its_import_is_one_sentence(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "broken.py").write_text(body)
    with refused(UsageError, "data"):
        config.load(Training, ROOT / "configs" / "smoke.yaml", ["--data.kind", "my_lab.broken"])


def test_what_ships_with_the_project_is_included_by_its_name(tmp_path: Path) -> None:
    one = write(tmp_path, "include: [kl_f8_d4, profiles/small_gpu.yaml]\nresolution: 64\n")
    found = config_file.read_yaml(one)
    assert found["resolution"] == 64 and found["gradient_checkpointing"] is True and "losses" in found
    (tmp_path / "kl_f8_d4").write_text("seed: 7\n")
    assert config_file.read_yaml(one)["seed"] == 7, "a file beside it comes first"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "line 2: `name` is there twice, first in line 1"),
        ("losses:\n  kl: {weight: 1}\n  kl: {weight: 2}\n", "line 3: `kl`"),
        ('losses:\n  a: "\\ud800"\n', "line 2: half of a character"),
        ("include: fan0.yaml\n", "64 files"),
        ("include: enormous.yaml\n", "1,048,576 bytes"),
        ("include: fifo\n", "no such file"),
        ("include: /dev/zero\n", "no such file"),
    ],
)
def test_a_file_that_has_no_end_or_two_meanings_is_refused(tmp_path: Path, text: str, says: str) -> None:
    for level in range(10):
        write(tmp_path, f"include: [{', '.join([f'fan{level + 1}.yaml'] * 10)}]\n", f"fan{level}.yaml")
    write(tmp_path, "{}", "fan10.yaml")
    with (tmp_path / "enormous.yaml").open("wb") as file:
        file.truncate(2**30)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=says):
        config_file.read_yaml(write(tmp_path, text))


@pytest.mark.parametrize("kind", ["..os", ".", "os", "os.path", "os.", "../os"])
def test_a_kind_that_is_no_option_and_no_module(kind: str, tmp_path: Path) -> None:
    with refused(UsageError, "discriminator"):
        config.load(Outer, write(tmp_path, GOOD.replace("kind: patchgan", f"kind: {kind}")))


@pytest.mark.parametrize("flag", ["--rate=1e300", "--losses.l1.weight=-1e17", "--inner.steps=9007199254740993"])
def test_a_number_beyond_all_meaning_is_refused(flag: str, tmp_path: Path) -> None:
    with refused(UsageError, flag.partition("=")[0]):
        config.load(Outer, write(tmp_path, GOOD), flag.split("="))


def test_a_module_that_leaves_the_program_does_not_look_like_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leaving_lab.py").write_text("import sys\nprint('here')\ndef build(): sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: importlib.import_module("leaving_lab").build())
    assert stop.value.code == 1 and "leaving_lab" in capsys.readouterr().err
