"""Flags against records: what overrides what, what is said of it, and which differences are refused."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli_call import call, program
from diffusers import AutoencoderKL
from sentences import refused
from tiny_networks import SHAPE

from eval import diffusability, latent_space, reconstruction, scramble
from ldm_vae import metrics
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import record, recorded
from ldm_vae.cli import parser
from ldm_vae.core.config import options
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.request import Parser
from ldm_vae.data.flags import KINDS, DataFlags, add_data_arguments
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.latent_store import read_manifest
from ldm_vae.report import tables
from ldm_vae.training.config import Training, build_autoencoder
from ldm_vae.training.teachers import check_teachers

RANGE = Preprocessing(channels=1, value_range=(0, 4095), resize="none")
OTHER = Preprocessing(channels=1, value_range=(-1000, 1000), resize="none")


def evaluate(*words: object) -> None:
    program(reconstruction, *words, "--resolution", 16, "--metrics", "psnr", "--num_workers", 0)


# --- flags ------------------------------------------------------------------------------------------------------------


def flags_of(argument_parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in argument_parser._actions for flag in action.option_strings}


def verbs_with_data() -> dict[str, argparse.ArgumentParser]:
    """Every parser of `ldm-vae` that takes DATA or images as an argument of that name."""
    found = {}

    def walk(name: str, one: argparse.ArgumentParser) -> None:
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                for verb, inner in action.choices.items():
                    walk(f"{name} {verb}".strip(), inner)
            elif "DATA" in str(action.metavar).split("|"):
                found[name] = one

    walk("", parser())
    return found


def test_every_verb_with_data_has_every_flag() -> None:
    shared = Parser()
    add_data_arguments(shared)
    found = verbs_with_data()
    assert {"encode", "export", "drift", "fp16 audit", "fp16 fix", "inspect", "store verify"} < {*found}
    for name, one in found.items():
        # no network whose training held images out
        without = {"--part"} if name == "inspect" or name.startswith("store ") else set()
        assert flags_of(shared) - without - ({"--resize"} if name == "inspect" else set()) <= flags_of(one), name
        assert "--part" not in without & flags_of(one), name


@pytest.mark.parametrize("module", [reconstruction, latent_space, diffusability, scramble])
def test_every_program_with_data_has_every_flag(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program(module, "--help")
    shared = Parser()
    add_data_arguments(shared)
    shown = capsys.readouterr().out.split()
    assert all(flag in shown for flag in flags_of(shared) - {"-h", "--help"})


def test_kinds_are_the_files_there_are() -> None:
    assert [*KINDS] == options("ldm_vae.data.sources")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"channels": 0}, "channels"),
        ({"value_range": [3.0, 3.0]}, "value_range"),
        ({"value_range": [0.0, float("nan")]}, "value_range"),
        ({"background": [0, 0, 256]}, "background"),
    ],
)
def test_flags_that_nothing_can_be_decoded_with(given: dict[str, Any], field: str) -> None:
    with refused(UsageError, f"--{field}"):
        DataFlags.of(argparse.Namespace(**given))


def test_a_flag_overrides_the_record_and_is_said(
    grey_folder: Path,
    scans: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluate(grey_folder, scans, "--output", tmp_path / "own")
    evaluate(grey_folder, scans, "--output", tmp_path / "other", "--value_range", 0, 65535, "--resize", "short_side")
    own, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("own", "other"))
    schema = json.loads((Path(metrics.__file__).parent / "metrics.schema.json").read_text())
    for found in (own, other):
        jsonschema.validate(found, schema)
    assert own["data"]["preprocessing"] == "1 channels=1 value_range=(0.0, 4095.0) resize='none'"
    assert own["data"]["notes"] == [] and own["data"]["checksum"] != other["data"]["checksum"]
    assert other["data"]["preprocessing"] == "1 channels=1 value_range=(0.0, 65535.0)"
    notes = other["data"]["notes"]
    assert len(notes) == 2 and all("grey" in note for note in notes)
    assert "[0, 4095]" in notes[0] and "[0, 65535]" in notes[0] and "short_side" in notes[1] and "none" in notes[1]
    assert "Pixels as they are" in tables.protocol([own])[2] and "Short side resized" in tables.protocol([other])[2]
    assert all(note in tables.protocol([other])[2] for note in notes)
    said = (tmp_path / "other" / "metrics.md").read_text()
    assert all(note in said and note in capsys.readouterr().out + said for note in notes)

    store = tmp_path / "store"
    encode = ("encode", grey_folder, scans, store, "--resolution", 16, "--num_workers", 0)
    call(*encode, "--value_range", 0, 65535)
    assert read_manifest(store).identity.preprocessing == "1 channels=1 value_range=(0.0, 65535.0) resize='none'"
    with refused(UsageError, "preprocessing"):  # begun with another
        call(*encode)
    with caplog.at_level(logging.WARNING):
        call("store", "verify", store, "--reencode", 3)  # as the store says, and what the network says is said
    assert "3 to the same bits" in capsys.readouterr().out
    (note,) = [one.getMessage() for one in caplog.records if one.name == "ldm_vae.latent_store.maintain.provenance"]
    assert note.startswith("value_range") and "[0, 65535]" in note and "[0, 4095]" in note
    with pytest.raises(WorkError):
        call("store", "verify", store, "--reencode", 3, "--value_range", 0, 4095)


def test_channels_are_the_networks(grey_folder: Path, scans: Path, tmp_path: Path) -> None:
    with refused(UsageError, "--channels") as error:
        evaluate(grey_folder, scans, "--output", tmp_path / "out", "--channels", 3)
    assert "expected 1" in str(error.value) and "got 3" in str(error.value)


def test_a_draft_and_pixels_as_they_are_exclude_each_other(grey_folder: Path, scans: Path, tmp_path: Path) -> None:
    with refused(UsageError, "--jpeg_draft"):
        call("encode", grey_folder, scans, tmp_path / "out", "--resolution", 16, "--jpeg_draft")
    assert not (tmp_path / "out").exists()


# --- two that differ --------------------------------------------------------------------------------------------------


def test_two_networks_that_differ_are_both_named(
    grey_vae: AutoencoderKL, grey_folder: Path, scans: Path, tmp_path: Path
) -> None:
    other = write_vae(record(grey_vae, OTHER), tmp_path / "other", None)
    silent = write_vae(record(grey_vae, None), tmp_path / "silent", None)
    out = ("--output", tmp_path / "out")
    for words in (("drift", grey_folder, other, scans, "--resolution", 16, "--no_lpips"),
                  ("export", grey_folder, tmp_path / "new", "--stats", scans, "--drift_from", other)):  # fmt: skip
        with refused(UsageError, "value_range") as error:
            call(*words)
        assert "grey" in str(error.value) and "other" in str(error.value)
    with refused(UsageError, "value_range") as error:
        evaluate(grey_folder, other, scans, *out)
    assert "grey" in str(error.value) and "other" in str(error.value)
    evaluate(grey_folder, other, scans, *out, "--value_range", 0, 4095)
    notes = json.loads((tmp_path / "out" / "metrics.json").read_text())[0]["data"]["notes"]
    assert len(notes) == 1 and "other" in notes[0]
    evaluate(silent, grey_folder, scans, *out)  # who records nothing follows who does
    assert "4095" in json.loads((tmp_path / "out" / "metrics.json").read_text())[0]["data"]["preprocessing"]


def test_a_store_and_a_network_that_differ_are_both_named(grey_folder: Path, scans: Path, tmp_path: Path) -> None:
    stores = [tmp_path / "same", tmp_path / "other"]
    encode = ("encode", grey_folder, scans, "--resolution", 16, "--num_workers", 0)
    call(*encode, stores[0])
    call(*encode, stores[1], "--value_range", 0, 65535)
    call("export", grey_folder, tmp_path / "out", "--stats", stores[0])
    with refused(UsageError, "value_range") as error:
        call("export", grey_folder, tmp_path / "out", "--stats", stores[1])
    assert "[0, 4095]" in str(error.value) and "[0, 65535]" in str(error.value)
    call("export", grey_folder, tmp_path / "out", "--stats", stores[1], "--value_range", 0, 65535)
    assert recorded(load_autoencoder(tmp_path / "out")) == RANGE.model_copy(update={"value_range": (0.0, 65535.0)})


@pytest.mark.parametrize(
    ("data", "transform", "field"),
    [
        ({}, {"resize": "none"}, "data.value_range"),
        ({"value_range": [0, 4095], "background": [0, 0, 0]}, {"resize": "none"}, "data.background"),
        ({"value_range": [0, 4095]}, {}, "transform.resize"),
    ],
)
def test_fine_tuning_goes_on_with_what_its_base_records(
    grey_folder: Path, data: dict[str, Any], transform: dict[str, Any], field: str
) -> None:
    def settings(data: dict[str, Any], transform: dict[str, Any], **more: Any) -> Training:
        return Training.model_validate({
            "output_dir": "x", "init_from": str(grey_folder), "model": SHAPE | {"in_channels": 1},
            "losses": {"l1": {"weight": 1.0}}, "transform": transform,
            "data": {"kind": "folder", "path": "x", "channels": 1, **data}, **more,
        })  # fmt: skip

    with refused(UsageError, field) as error:
        build_autoencoder(settings(data, transform))
    assert "ignore_preprocessing" in str(error.value)
    build_autoencoder(settings(data, transform, ignore_preprocessing=True))
    build_autoencoder(settings({"value_range": [0, 4095]}, {"resize": "none"}))


def test_a_teacher_must_see_what_it_records(grey_folder: Path) -> None:
    def settings(**more: Any) -> Training:
        return Training.model_validate({
            "output_dir": "x", "model": SHAPE | {"in_channels": 1}, "transform": {"resize": "none"},
            "losses": {"l1": {"weight": 1.0}, "drift": {"weight": 1.0, "teacher": str(grey_folder)}},
            "data": {"kind": "folder", "path": "x", "channels": 1}, **more,
        })  # fmt: skip

    vae = build_autoencoder(settings())
    with refused(UsageError, "data.value_range") as error:
        check_teachers(settings(), vae)
    assert "losses.drift.teacher" in str(error.value)
    check_teachers(settings(ignore_preprocessing=True), vae)


@pytest.mark.parametrize(
    ("train", "held_out", "field"),
    [
        ({"value_range": [0, 4095]}, {}, "value_range"),
        ({}, {"value_range": [0, 4095]}, "value_range"),
        ({"background": [0, 0, 0]}, {}, "background"),
        ({"value_range": [0, 4095]}, {"value_range": [0, 1]}, None),  # other files, both said
    ],
)
def test_validation_is_decoded_as_training_is(
    train: dict[str, Any], held_out: dict[str, Any], field: str | None
) -> None:
    folder = {"kind": "folder", "path": "x"}
    tree = {
        "output_dir": "x", "model": SHAPE, "losses": {"l1": {"weight": 1.0}}, "data": folder | train,
        "validation_data": folder | held_out,
    }  # fmt: skip
    if field is None:
        assert Training.model_validate(tree).validation_data.value_range == (0, 1)
        return
    with pytest.raises(ValueError, match=rf"validation_data\.{field}"):
        Training.model_validate(tree)
