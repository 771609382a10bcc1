"""Names that could be a path or a hub id, and a hub that does not answer: never a call too many, never a minute."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from sentences import refused

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core import hub
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import nearest_path
from ldm_vae.data.source import open_source
from ldm_vae.discriminators.features import Config as Critic
from ldm_vae.perceptual import features, teacher

CPU = torch.device("cpu")
READERS: dict[str, Callable[[str], Any]] = {
    "VAE": load_autoencoder,
    "teacher": teacher.Teacher,
    "data": open_source,
    "data.path": partial(open_source, kind="hub"),
    "discriminator.backbone": lambda name: Critic(backbone=name).build(),
    "backbone": lambda name: Critic(backbone=name).outline(),  # of a dry run
    "dinov2": lambda name: features.dinov2(name, CPU),
    "clip": lambda name: features.clip(name, CPU),
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients of the hub may call it, and have not yet."""
    for name in ("HF_HUB_OFFLINE", "LDM_VAE_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.connect.cache_clear()
    yield
    hub.connect.cache_clear()


@pytest.mark.parametrize("reader", READERS)
def test_a_mistyped_path_is_refused_without_a_call(
    reader: str, online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def call(*_: object) -> None:
        raise AssertionError("the network was called")

    monkeypatch.setattr(socket.socket, "connect", call)
    for name in ("./demo", "../demo", "/nowhere/demo", "~/no-demo", "a/b/demo", "demo", "a/demo.safetensors",
                 "a/demo.zip", "runs/dmeo"):  # fmt: skip
        with pytest.raises(UsageError, match=r"no such f|expected a hub id") as refusal:
            READERS[reader](name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value)
    assert "did you mean `runs/demo`" in str(refusal.value)


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(hub.is_id, ("owner/name", "stabilityai/sd-vae-ft-mse", "black-forest-labs/FLUX.1-dev", "me/v1.5")))
    (tmp_path / "owner").mkdir()
    assert not hub.is_id("owner/name")
    with refused(UsageError, "VAE"):
        hub.check_id("owner/name", "VAE owner/name")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("photo/trian", "photos"),
        ("photo/train", "photos/train"),
        ("photos/trian/x.png", "photos/train/x.png"),
        ("./photos/trian", "photos/train"),
        ("Photos", "photos"),
        ("photos/train/x.png", None),
        ("elsewhere", None),
        ("photos/train/x.png/y", None),
    ],
)
def test_the_nearest_path(typed: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "x.png").touch()
    assert nearest_path(typed) == ("" if meant is None else f", did you mean `{meant}`")


class _Failing(BaseHTTPRequestHandler):
    """Answers every request with a failure, or after a while."""

    pause = 0.0

    def do_HEAD(self) -> None:
        Event().wait(self.pause)
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("how", ["refused", "silent", "failing"])
def test_a_hub_that_fails_costs_seconds_and_is_named(how: str, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Failing)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    monkeypatch.setattr(_Failing, "pause", 1.0 if how == "silent" else 0.0)
    if how == "refused":
        server.server_close()
    else:
        Thread(target=server.serve_forever, daemon=True).start()
    try:
        for reader in ("VAE", "data", "clip"):
            began = time.monotonic()
            with pytest.raises(UsageError, match=f"{address} (does not answer|answers with status 503).*not in the"):
                READERS[reader]("owner/name")
            assert time.monotonic() - began < 10
    finally:
        if how != "refused":
            server.shutdown()
            server.server_close()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE  # for the clients in other packages
