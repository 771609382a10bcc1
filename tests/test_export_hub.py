"""--push_to_hub against a hub on the loopback interface: what is sent, what is said when it refuses, and no token."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from export_call import run_cli


class Hub(BaseHTTPRequestHandler):
    """Just enough of the protocol: create, validate the card, ask how to upload, commit."""

    received: dict[str, bytes]
    paths: list[str]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).paths.append(self.path)
        if type(self).refuses:
            self.answer({"error": "You shall not pass"}, 403)
        elif self.path == "/api/repos/create":
            tree = json.loads(body)
            name = f"{tree.get('organization') or 'me'}/{tree['name']}"
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        type(self).paths.append(self.path)
        self.answer({"id": "me/mine", "sha": "1" * 40, "siblings": []})

    def answer(self, tree: object, status: int = 200) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.received, Hub.paths, Hub.refuses = {}, [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


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
