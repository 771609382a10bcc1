"""A store at a URL is read as the folder is, whatever the network does, by many processes, in a bounded cache."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from fork_server import fork, forkserver
from kills import wait_until
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS, encoded, same
from upstream import FLOOD, Fault, Upstream, serving

from ldm_vae.core import files, fsspec_files
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import (
    LatentDataset,
    read_manifest,
    verify,
    write_store,
)
from ldm_vae.latent_store.format.layout import MAPPED_ROWS, TENSORS
from ldm_vae.latent_store.read import mapped_files

COLUMNS = ("key", "caption", "label", "tags")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded once; tests that change it take a copy."""
    return encoded(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, and waits that cost no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fsspec_files, "FIRST_WAIT", 0.001)
    return tmp_path / "cache" / "ldm-vae" / "stores"


@pytest.fixture
def upstream(folder: Path) -> Iterator[Upstream]:
    with serving(folder) as server:
        yield server


def held(cache: Path) -> list[str]:
    """The names of the files in the cache."""
    return sorted(path.name for path in cache.iterdir() if path.is_file())


@pytest.mark.parametrize("scheme", ["http", "memory", "file"])
def test_what_is_read_is_what_the_folder_gives(scheme: str, folder: Path, upstream: Upstream) -> None:
    url = {"http": upstream.url, "memory": "memory://remote", "file": folder.as_uri()}[scheme] + "/latents"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(folder / "latents"), "/remote/latents", recursive=True)
    for options in ({"raw": True}, {"view": "random"}, {"columns": ("caption",)}):
        same(LatentDataset(url, **options), LatentDataset(folder / "latents", **options))
    remote, local = LatentDataset(url, columns=COLUMNS), LatentDataset(folder / "latents", columns=COLUMNS)
    same(pickle.loads(pickle.dumps(remote)), local)
    for workers in (0, 1, 2):
        loader, plain = remote.loader(4, num_workers=workers), local.loader(4)
        for _ in range(2):  # epochs
            for one, other in zip(loader, plain, strict=True):
                assert torch.equal(one["latents"], other["latents"]) and one["caption"] == other["caption"]
    assert remote.manifest == local.manifest
    if scheme == "http":
        files = [name for name in upstream.asked if name.endswith((TENSORS, MAPPED_ROWS))]
        assert len(files) == 6 and all(upstream.asked[name] == 1 for name in files), "by four workers, each file once"


def test_what_passes_is_tried_again(folder: Path, upstream: Upstream, cache: Path) -> None:
    upstream.faults = {
        "manifest.json": ["500", "cut"],
        "00000000.safetensors": ["500", "cut", "cut", "500"],
        "00000001.safetensors": ["corrupt"],
        "00000002.arrow": ["cut"],
    }
    same(LatentDataset(f"{upstream.url}/latents"), LatentDataset(folder / "latents"))
    assert upstream.asked["00000000.safetensors"] == 5 and upstream.asked["00000001.safetensors"] == 2
    assert len(held(cache)) == 6 and not any(name.endswith(".tmp") for name in held(cache))


def test_what_stays_wrong_is_one_sentence_and_nothing_of_it_is_kept(upstream: Upstream, cache: Path) -> None:
    data = LatentDataset(f"{upstream.url}/latents", columns=())
    file = f"{upstream.url}/latents/shards/00000000.safetensors"
    upstream.faults = {"00000000.safetensors": ["corrupt"] * 20}
    with refused(WorkError, file):
        data[0]
    upstream.faults = {"00000000.safetensors": ["404"] * 20}
    with refused(WorkError, file):
        data[0]
    upstream.faults = {"00000000.safetensors": ["500"] * 20}
    with pytest.raises(WorkError, match=file) as error:  # and aiohttp's words, so not golden; as the next
        data[0]
    assert "6 attempts" in str(error.value)
    upstream.faults = {"00000000.safetensors": ["cut"] * 20}
    with pytest.raises(WorkError, match=file) as error:
        next(iter(data.loader(8, shuffle=False, num_workers=1)))
    assert "6 attempts" in str(error.value)
    tensors = data.shards[0].files[TENSORS]
    assert not any(tensors.sha256 in name for name in held(cache))
    upstream.faults = {}
    data[0]
    with refused(UsageError, f"{upstream.url}/nothing"):
        LatentDataset(f"{upstream.url}/nothing")


@pytest.mark.parametrize("fault", ["endless", "bomb"])
def test_no_more_is_taken_than_the_manifest_says(
    fault: Fault, upstream: Upstream, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{upstream.url}/latents"
    data = LatentDataset(url, columns=())
    upstream.faults = {name: [fault] for name in ("00000000.safetensors", "00000001.safetensors", "manifest.json")}
    with refused(WorkError, "00000000.safetensors"):
        data[0]
    assert not any(name.endswith(TENSORS) for name in held(cache))
    with refused(WorkError, "manifest.json"):
        monkeypatch.setattr(fsspec_files, "LARGEST", 1 << 20)
        LatentDataset(url)
    assert upstream.flooded < FLOOD / 2, "of two floods"


def test_what_stands_still_is_given_up(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a minute after the one before: so long took the few bytes that came."""
    data = LatentDataset(f"{upstream.url}/latents", columns=())
    clock = itertools.count(step=files.WINDOW)
    monkeypatch.setattr(fsspec_files, "clock", lambda: next(clock))
    monkeypatch.setattr(files, "LEAST", 2**30)
    with refused(WorkError, "00000000.safetensors"):
        data[0]
    assert upstream.asked["00000000.safetensors"] == 6
    monkeypatch.setattr(files, "LEAST", 0)
    data[0]


def read_first(url: str) -> None:
    LatentDataset(url, columns=())[0]


def test_killed_in_the_middle_of_a_download(folder: Path, upstream: Upstream, cache: Path) -> None:
    upstream.faults = {"00000000.safetensors": ["stall"]}
    child = fork(partial(read_first, f"{upstream.url}/latents"), [])
    wait_until(lambda: cache.exists() and held(cache), child)  # the client has begun, and the server will not end
    child.kill(signal.SIGKILL)
    assert child.wait().returncode == -signal.SIGKILL
    upstream.go_on.set()
    assert [name.endswith(".tmp") for name in held(cache)] == [True]
    same(LatentDataset(f"{upstream.url}/latents"), LatentDataset(folder / "latents"))
    assert len(held(cache)) == 6 and not any(name.endswith(".tmp") for name in held(cache)), "it is gone"


def read_all(url: str, ready: Any, sums: Any) -> None:
    data = LatentDataset(url, columns=("key",))
    ready.wait()
    sums.put(float(sum(item["latents"].double().sum() for item in data)))


def test_processes_download_each_file_once_between_them(folder: Path, upstream: Upstream) -> None:
    context = forkserver()
    ready, sums = context.Barrier(3, timeout=300), context.SimpleQueue()
    children = [fork(partial(read_all, f"{upstream.url}/latents", ready, sums), []) for _ in range(3)]
    for child in children:
        done = child.wait()
        assert done.returncode == 0, done.stderr
    totals = {sums.get() for _ in children}
    assert totals == {float(sum(item["latents"].double().sum() for item in LatentDataset(folder / "latents")))}
    asked = {name: count for name, count in upstream.asked.items() if name != "manifest.json"}
    assert len(asked) == 6 and set(asked.values()) == {1}


def test_the_cache_is_bounded_and_evicted_maps_are_given_up(
    folder: Path, upstream: Upstream, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_files, "LOOK_EVERY", 0.0)
    local = LatentDataset(folder / "latents")
    files = [file.bytes for shard in local.shards for name, file in shard.files.items() if name != "parquet"]
    limit = max(files) + min(files) + 10
    data = LatentDataset(f"{upstream.url}/latents", cache_bytes=limit)
    for _ in range(2):
        for index in range(21):
            assert torch.equal(data[index]["latents"], local[index]["latents"])
            assert sum((cache / name).stat().st_size for name in held(cache)) <= limit
            assert len(data._maps) <= 2, "the newest, and one that left when it came"
    assert upstream.asked["00000000.safetensors"] == 2
    assert torch.equal(data.__getitems__([0, 9, 20])[1]["latents"], local[9]["latents"]), "a batch over more than fits"
    with pytest.warns(UserWarning, match="shuffled reading will download shards again and again"):
        batches = list(data.loader(5, num_workers=2))
    for one, other in zip(batches, local.loader(5), strict=True):
        assert torch.equal(one["latents"], other["latents"])
    with refused(UsageError, "cache_bytes"):
        LatentDataset(f"{upstream.url}/latents", cache_bytes=100)
    monkeypatch.setenv("LDM_VAE_STORE_CACHE", "1e2")
    with refused(UsageError, "cache_bytes"):
        LatentDataset(f"{upstream.url}/latents")
    monkeypatch.setenv("LDM_VAE_STORE_CACHE", "much")
    with refused(UsageError, "LDM_VAE_STORE_CACHE"):
        LatentDataset(f"{upstream.url}/latents")


def test_what_was_used_longest_ago_leaves_first(upstream: Upstream, cache: Path) -> None:
    data = LatentDataset(f"{upstream.url}/latents", columns=())
    first, second, third = (shard.files[TENSORS] for shard in data.shards)
    data[0], data[8]
    for age, file in enumerate((second, first)):
        os.utime(cache / f"{file.sha256}.{TENSORS}", (1000 + age, 1000 + age))
    (cache / ".killed.tmp").write_bytes(b"long ago")
    os.utime(cache / ".killed.tmp", (999, 999))
    (cache / ".busy.tmp").write_bytes(b"")
    LatentDataset(f"{upstream.url}/latents", columns=(), cache_bytes=first.bytes + third.bytes)[20]
    assert held(cache) == sorted([".busy.tmp", *(f"{file.sha256}.{TENSORS}" for file in (first, third))])
    (cache / f"{first.sha256}.{TENSORS}").write_bytes(b"cut short")
    same(LatentDataset(f"{upstream.url}/latents"), LatentDataset(upstream.root / "latents"))


def test_a_store_that_was_replaced_is_read_as_it_is_now(
    folder: Path, tiny_vae: AutoencoderKL, tmp_path: Path, upstream: Upstream
) -> None:
    upstream.root = shutil.copytree(folder, tmp_path / "changing")
    url = f"{upstream.url}/latents"
    before = LatentDataset(url, sample=False)
    before[0]
    with torch.no_grad():
        tiny_vae.encoder.conv_in.weight.mul_(2)
    shutil.rmtree(upstream.root / "latents")
    write_store(tiny_vae, Pictures(24), upstream.root / "latents", **SETTINGS)
    same(LatentDataset(url), LatentDataset(upstream.root / "latents"))
    old = LatentDataset(folder / "latents", sample=False)
    assert torch.equal(before[0]["latents"], old[0]["latents"]), "and what is open stays"
    with refused(WorkError, "00000002.safetensors"):
        before[20]


def test_rows_come_from_the_parquet_where_arrow_is_missing(folder: Path, upstream: Upstream) -> None:
    upstream.faults = {f"0000000{number}.arrow": ["404"] for number in range(3)}
    same(LatentDataset(f"{upstream.url}/latents"), LatentDataset(folder / "latents"))
    assert upstream.asked["00000002.parquet"] == 1


@pytest.mark.parametrize(
    ("old", "new"), [("0", "../../../x"), ("name", "../../../x"), ("name", "/etc/passwd"), ("0", "A" * 64)]
)
def test_a_manifest_that_points_elsewhere_is_refused(
    old: str, new: str, folder: Path, upstream: Upstream, tmp_path: Path
) -> None:
    upstream.root = shutil.copytree(folder, tmp_path / "hostile")
    path = upstream.root / "latents" / "manifest.json"
    tree = json.loads(path.read_bytes())
    if old == "name":
        tree["shards"][0]["name"] = new
    else:
        tree["shards"][0]["files"]["safetensors"]["sha256"] = new
    path.write_text(json.dumps(tree))
    with pytest.raises(WorkError, match=r"manifest\.json.*`shards\.0"):  # and pydantic's words, so not golden
        LatentDataset(f"{upstream.url}/latents")


def test_the_loader_fetches_ahead_in_its_order(upstream: Upstream) -> None:
    batches = iter(LatentDataset(f"{upstream.url}/latents", columns=()).loader(2, shuffle=False))
    next(batches)  # of the first shard; two batches ahead is the first one still
    until = time.monotonic() + 60
    while upstream.asked["00000002.safetensors"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert upstream.asked["00000002.safetensors"] == 1, "though nobody has read from it"
    assert len(list(batches)) == 10


def test_what_fsspec_does_not_know_or_is_not_installed() -> None:
    with pytest.raises(UsageError, match=r"^qqq://x/manifest\.json: .*memory"):  # all that fsspec knows, so not golden
        LatentDataset("qqq://x")
    with refused(UsageError, "gs://bucket/x/manifest.json"):
        LatentDataset("gs://bucket/x")


def test_the_commands_take_a_url(
    folder: Path, upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{upstream.url}/latents"
    assert run_cli("store", "stats", url) == 0
    assert f"{url}: 21 samples in 3 shards" in capsys.readouterr().out
    assert run_cli("decode", url, tmp_path / "pictures", "--count", "3") == 0
    assert run_cli("decode", folder / "latents", tmp_path / "local", "--count", "3") == 0
    there, here = (sorted((tmp_path / name).glob("*.png")) for name in ("pictures", "local"))
    assert len(there) == 3 and [path.read_bytes() for path in there] == [path.read_bytes() for path in here]
    capsys.readouterr()
    assert run_cli("store", "verify", url) == 0
    assert "all 3 shards with 21 samples are sound" in capsys.readouterr().out
    upstream.faults = {"00000001.arrow": ["corrupt"] * 9}
    assert [problem.file for problem in verify(url)] == ["shards/00000001.arrow"], "though the cache has a good copy"
    assert read_manifest(url) == read_manifest(folder / "latents")
