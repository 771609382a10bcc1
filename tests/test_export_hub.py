"""--push_to_hub against a hub on the loopback interface: what is sent, what is said when it refuses, and no token."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_call import run_cli
from loopback_hub import Hub

# huggingface_hub's LFS upload calls its HTTP client in a way that this deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_the_whole_folder_arrives(
    hub: str, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert run_cli("export", tiny_vae_folder, out, "--push_to_hub", "me/mine") == 0
    said = capsys.readouterr()
    assert f"uploaded to {hub}/me/mine" in said.out
    assert Hub.received == {path.name: path.read_bytes() for path in out.iterdir()}
    assert "hf_secretsecret" not in said.out + said.err
    assert not any(b"hf_secretsecret" in content for content in Hub.received.values())


def test_pipeline_layout_arrives_in_its_folder(hub: str, tiny_vae_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert run_cli("export", tiny_vae_folder, out, "--pipeline", "--push_to_hub", "me/mine") == 0
    assert set(Hub.received) == {f"vae/{path.name}" for path in (out / "vae").iterdir()}


def test_a_refusal_is_one_sentence_and_the_folder_stays(
    hub: str, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Hub.refuses = True
    out = tmp_path / "mine"
    assert run_cli("export", tiny_vae_folder, out, "--push_to_hub", "me/mine") == 1
    said = capsys.readouterr().err
    assert "--push_to_hub me/mine" in said and "is written" in said and "Traceback" not in said
    assert (out / "config.json").is_file()


def test_offline_says_so(tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", tiny_vae_folder, tmp_path / "mine", "--push_to_hub", "me/mine") == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_wrong_names_and_files_are_refused_before_the_work(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", tiny_vae_folder, tmp_path / "a", "--push_to_hub", "a b") == 2
    assert "owner/name" in capsys.readouterr().err
    call = (tiny_vae_folder, tmp_path / "b.safetensors", "--target", "kohya", "--push_to_hub", "me/mine")
    assert run_cli("export", *call) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_vae"]
