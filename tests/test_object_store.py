"""A store straight in an object store: equal bytes, whole or not there, whatever the network and other writers do."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from loopback_s3 import BUCKET, ENVIRONMENT, Bucket, serve
from sentences import refused
from store_sources import AFTER, Album, Pictures, Stop, Stopping
from stores import SETTINGS, same

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core import ownership
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import Part
from ldm_vae.latent_store import LatentDataset, Manifest, read_manifest, verify, write_store
from ldm_vae.latent_store.storage import claims, fsspec_files
from ldm_vae.latent_store.storage.object_store import ObjectStore
from ldm_vae.latent_store.write.processes import Processes


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, serve() as bucket:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": bucket.endpoint}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield bucket


@pytest.fixture
def bucket(server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The server without faults, waits that cost no time, a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fsspec_files, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(claims, "LONGEST_PAUSE", 0.02)
    server.faults, server.always, server.requests = [], [], []
    return server


@pytest.fixture
def url(bucket: Bucket, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]}/latents"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


@pytest.fixture(scope="module")
def local(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of 40 pictures in a folder."""
    out = tmp_path_factory.mktemp("local") / "latents"
    encode(vae, str(out))
    return out


def encode(vae: AutoencoderKL, out: str, source: Any = None, part: Part = ownership.WHOLE, **more: Any) -> Manifest:
    return write_store(vae, source or Pictures(40, bad=(3,)), out, **SETTINGS, processes=Processes(part=part), **more)


def objects(url: str) -> dict[str, str]:
    """Every object of a store and its checksum; claims too, which are gone at the end."""
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    below = url.removeprefix("s3://")
    return {
        name.removeprefix(f"{below}/"): hashlib.sha256(content).hexdigest()
        for name, content in files.cat(files.find(below)).items()
    }


def of_folder(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name != ownership.MARK}


def test_a_store_is_the_folders_bytes_and_is_read_verified_and_found_finished(
    bucket: Bucket, url: str, vae: AutoencoderKL, local: Path
) -> None:
    manifest = encode(vae, url)
    assert manifest == read_manifest(local) and objects(url) == of_folder(local)
    same(LatentDataset(url, columns=("caption",)), LatentDataset(local, columns=("caption",)))
    assert verify(url) == []
    puts = bucket.count("PUT", "/shards/")
    assert encode(vae, url) == manifest and bucket.count("PUT", "/shards/") == puts
