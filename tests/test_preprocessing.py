"""preprocessing.json: what it says, who carries it on, what overrides it, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_call import call
from diffusers import AutoencoderKL
from sentences import refused

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of, record, recorded
from ldm_vae.autoencoder.single_file import save_single_file
from ldm_vae.core.errors import UsageError
from ldm_vae.data import preprocessing
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.preprocessing import FILE, Preprocessing
from ldm_vae.latent_store import read_manifest

RANGE = Preprocessing(channels=1, value_range=(0, 4095), resize="none")  # of conftest's grey_folder


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written() -> None:
    for one in (RANGE, Preprocessing(channels=4, alpha="channel", background=(1, 2, 3))):
        assert preprocessing.parse(one.to_bytes(), "x") == one
        assert Preprocessing.of(Decoding(one.channels, one.background, one.value_range, resize=one.resize)) == one


def change(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"signal": "sound"}, "signal"),
        ({"value_range": [7, 7]}, "value_range"),
        ({"value_range": [0, float("inf")]}, "value_range"),
        ({"input_range": [0, 1]}, "input_range"),
        ({"background": [0, 0, 300]}, "background"),
        ({"alpha": "channel"}, "alpha"),
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(grey_folder: Path, changes: dict[str, Any], field: str) -> None:
    path = grey_folder / FILE
    change(path, changes)
    with refused(UsageError, f"`{field}") as refusal:
        load_autoencoder(grey_folder)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": "many"}, "channels"),
        ({"value_range": [0]}, "value_range"),
        ({"colour": "lab"}, "colour"),
        ({"resize": "long_side"}, "resize"),
        ({"crop": "random"}, "crop"),
        ({"frames": 16}, "frames"),
    ],
)
def test_what_is_no_value_of_a_field_is_refused_by_its_name(
    grey_folder: Path, changes: dict[str, Any], field: str
) -> None:
    path = grey_folder / FILE
    change(path, changes)
    with pytest.raises(UsageError, match=f"`{field}") as refusal:  # and pydantic's words, so not golden
        load_autoencoder(grey_folder)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_a_damaged_record_is_one_sentence(grey_folder: Path, content: bytes) -> None:
    (grey_folder / FILE).write_bytes(content)
    with pytest.raises(UsageError, match=FILE) as refusal:  # and json's words, so not golden
        load_autoencoder(grey_folder)
    assert "\n" not in str(refusal.value)


def test_a_record_of_other_channels_than_the_network_takes_is_refused(grey_folder: Path) -> None:
    (grey_folder / FILE).write_bytes(Preprocessing(channels=3).to_bytes())
    with refused(UsageError, "`channels`"):
        load_autoencoder(grey_folder)


# --- who carries it on ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_form_of_a_network_carries_it_on(grey_folder: Path, tmp_path: Path) -> None:
    call("export", grey_folder, tmp_path / "folder", "--normalisation_from", grey_folder)
    call("export", tmp_path / "folder", tmp_path / "file.safetensors", "--target", "comfyui")
    call("export", tmp_path / "file.safetensors", tmp_path / "pipe", "--pipeline")
    call("fp16", "fix", tmp_path / "pipe", tmp_path / "fixed", "--resolution", 16)
    forms = ("folder", "file.safetensors", "pipe", "pipe/vae", "fixed")
    assert [recorded(load_autoencoder(tmp_path / form)) for form in forms] == [RANGE] * len(forms)
    assert "black and white are [0, 4095] in the file" in (tmp_path / "folder" / "README.md").read_text()
    assert AutoencoderKL.from_pretrained(tmp_path / "folder").config.in_channels == 1
    call("export", grey_folder, tmp_path / "folder", "--normalisation_from", grey_folder)  # an export may replace it
    bare = tmp_path / "bare.safetensors"
    save_single_file(record(load_autoencoder(grey_folder), None), bare)
    assert recorded(load_autoencoder(bare)) is None
    assert recorded(load_autoencoder(bare, grey_folder)) == RANGE  # beside the config.json that describes it


def test_a_single_files_damaged_record_is_refused(grey_folder: Path, tmp_path: Path) -> None:
    vae, path = load_autoencoder(grey_folder), tmp_path / "x.safetensors"
    save_single_file(record(vae, RANGE), path)
    path.write_bytes(path.read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with refused(UsageError, "`version`"):
        load_autoencoder(path)


def test_a_folder_without_one_is_fed_as_ever(grey_vae: AutoencoderKL, scans: Path, tmp_path: Path) -> None:
    grey_vae.save_pretrained(tmp_path / "old")
    vae = load_autoencoder(tmp_path / "old")
    assert recorded(vae) is None and preparation_of({"old": vae}).decoding == Decoding(channels=1)
    call("encode", tmp_path / "old", scans, tmp_path / "store", "--resolution", 16, "--num_workers", 0)
    assert read_manifest(tmp_path / "store").identity.preprocessing == "1 channels=1"
    call("export", tmp_path / "old", tmp_path / "new", "--stats", tmp_path / "store")
    assert not (tmp_path / "new" / FILE).exists()
    call("export", tmp_path / "old", tmp_path / "new", "--stats", scans, "--value_range", 0, 4095, "--resolution", 16)
    assert recorded(load_autoencoder(tmp_path / "new")) == Preprocessing(channels=1, value_range=(0, 4095))


def test_a_hostile_config_is_no_record(tiny_vae_folder: Path) -> None:
    path = tiny_vae_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_ldm_vae_preprocessing": "x", "preprocessing": "y"}))
    assert recorded(load_autoencoder(tiny_vae_folder)) is None


def test_a_run_from_before_the_file_says_it_in_its_config(grey_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(grey_folder, run / "vae")
    (run / "vae" / FILE).unlink()
    tree = {
        "output_dir": "x", "model": {"in_channels": 1}, "data": {"kind": "folder", "value_range": [0.0, 4095.0]},
        "transform": {"resize": "none"},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert recorded(load_autoencoder(run)) == recorded(load_autoencoder(run / "vae")) == RANGE
    for stranger in ("[1, 2]", "a: {", "data: {value_range: [0, 1]}"):  # somebody's own file of that name
        (run / "config.yaml").write_text(stranger)
        assert recorded(load_autoencoder(run)) is None


def test_the_record_of_a_hub_is_read_where_the_weights_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    (tmp_path / FILE).write_bytes(RANGE.to_bytes())
    asked = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(tmp_path / FILE)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert preprocessing.read_hub("me/vae") == preprocessing.read_hub("me/pipeline", "vae") == RANGE
    assert asked == [("me/vae", FILE), ("me/pipeline", f"vae/{FILE}")]

    def refuse(error: Exception) -> None:
        def download(*_: str) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    caplog.set_level(logging.WARNING)
    refuse(EntryNotFoundError("none"))
    assert preprocessing.read_hub("me/vae") is None and not caplog.records
    refuse(LocalEntryNotFoundError("offline"))
    assert preprocessing.read_hub("me/vae") is None
    assert [FILE in one.getMessage() for one in caplog.records] == [True]  # it may have one: said
    (tmp_path / FILE).write_bytes(b"{")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UsageError, match="me/vae"):  # and json's words, so not golden
        preprocessing.read_hub("me/vae")
