"""`store push` and `store pull` against a hub on the loopback interface: whole, resumed, updated, replaced, refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
import yaml
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from loopback_hub import Hub
from PIL import Image
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS, encoded, same

from ldm_vae.core import fsspec_files
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.export import store_push
from ldm_vae.latent_store import (
    LatentDataset,
    read_manifest,
    verify,
    write_store,
)
from ldm_vae.latent_store.remote.pull import plan_pull

# huggingface_hub's LFS upload calls its HTTP client in a way that this deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
URL = "hf://datasets/me/latents"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE and its store of three shards; tests that change it take a copy."""
    return encoded(tmp_path_factory.mktemp("sent"))


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fsspec_files, "FIRST_WAIT", 0.001)


def shard_files(store: Path) -> dict[str, str]:
    return {name: checksum for name, checksum in tree(store).items() if name.startswith("shards/")}


def test_pushed_read_there_and_pulled(
    folder: Path, hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = folder / "latents"
    with refused(UsageError, URL):  # which nobody may remember
        LatentDataset(URL)
    assert run_cli("store", "push", store, "me/latents", "--license", "cc0-1.0", "--dry_run") == 0
    assert "9 files to send" in capsys.readouterr().out and not Hub.exists and not Hub.commits
    assert run_cli("store", "push", store, "me/latents", "--license", "cc0-1.0") == 0
    said = capsys.readouterr()
    assert f"is at {hub}/datasets/me/latents" in said.out and "hf_secretsecret" not in said.out + said.err
    sent = shard_files(store)
    assert set(Hub.received) == {*sent, "manifest.json", "README.md", "samples.png"}
    assert not any("manifest.json" in files for files in Hub.commits[:-1]) and "manifest.json" in Hub.commits[-1]
    same(LatentDataset(URL), LatentDataset(store))
    assert run_cli("store", "pull", "me/latents", tmp_path / "copy") == 0
    assert shard_files(tmp_path / "copy") == sent and verify(tmp_path / "copy") == []
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()
    before = len(Hub.paths)
    assert run_cli("store", "pull", "me/latents", tmp_path / "copy", "--revision", "main") == 0
    assert not [path for path in Hub.paths[before:] if "shards/" in path], "what is there is not fetched again"


def test_the_card_shows_samples_and_gives_the_rows(folder: Path, tmp_path: Path) -> None:
    store_push.push(store_push.plan_push(folder / "latents", "me/latents"))
    for path, content in Hub.received.items():
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_bytes(content)
    rows = datasets.load_dataset(str(tmp_path / "clone"), cache_dir=str(tmp_path / "hf"))["train"]
    assert rows["caption"][:] == [f"picture {index}" for index in range(21)]
    card = Hub.received["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["pretty_name"] == "me/latents"
    assert f'LatentDataset("{URL}")' in card and "(samples.png)" in card and str(tmp_path.parent) not in card
    sheet = Image.open(io.BytesIO(Hub.received["samples.png"])).convert("RGB")
    assert sheet.size == (512, 512)
    pixels = LatentDataset(folder / "latents", sample=False)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    first = pixels.decode(pixels[0]["latents"], vae).clamp(-1, 1).add(1).mul(127.5).round()
    assert abs(torch.tensor(sheet.getpixel((3, 2))) - first[:, 2, 3]).max() <= 1


def test_without_its_vae_the_card_says_so(folder: Path, tmp_path: Path) -> None:
    store = shutil.copytree(folder / "latents", tmp_path / "moved" / "latents")
    text = (store / "manifest.json").read_text().replace(str(folder / "vae"), "/gone/vae")
    (store / "manifest.json").write_text(text)
    plan = store_push.plan_push(store, "me/latents")
    changed = AutoencoderKL.from_pretrained(folder / "vae")
    torch.nn.init.zeros_(changed.encoder.conv_in.weight)
    changed.save_pretrained(tmp_path / "other")
    with refused(UsageError, str(tmp_path / "other")):
        store_push.push(plan, vae=str(tmp_path / "other"))
    store_push.push(plan)
    assert "samples.png" not in Hub.received and b"its VAE was not at hand" in Hub.received["README.md"]
    store_push.push(store_push.plan_push(store, "me/latents"), vae=str(folder / "vae"))
    assert b"(samples.png)" in Hub.received["README.md"]


def test_an_interrupted_push_goes_on_and_is_no_store_until_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_push, "COMMIT_FILES", 4)
    Hub.refuse_after = 2
    assert run_cli("store", "push", folder / "latents", "me/latents") == 1
    said = capsys.readouterr().err
    assert "REPO_ID me/latents" in said and "the same command goes on from there" in said and "Traceback" not in said
    with refused(UsageError, URL):
        LatentDataset(URL)
    Hub.refuse_after = None
    plan = store_push.plan_push(folder / "latents", "me/latents")
    assert len(plan.missing) == 1, "two commits of four files are there"
    store_push.push(plan)
    assert set(Hub.uploads.values()) == {1}, "no object was sent twice"
    same(LatentDataset(URL), LatentDataset(folder / "latents"))


def test_an_update_sends_what_is_new_and_another_store_takes_the_place(
    folder: Path, tmp_path: Path, tiny_vae: AutoencoderKL
) -> None:
    store = shutil.copytree(folder / "latents", tmp_path / "latents")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    store_push.push(store_push.plan_push(store, "me/latents"))
    assert run_cli("store", "pull", "me/latents", tmp_path / "copy") == 0
    open_before = LatentDataset(URL, columns=())
    write_store(vae, Pictures(25), store, **SETTINGS, views="flip", update=True)
    plan = store_push.plan_push(store, "me/latents")
    assert len(plan.missing) == 3 and not plan.stale and not plan.overwrites
    store_push.push(plan)
    assert torch.equal(open_before[20]["latents"], LatentDataset(store)[20]["latents"])
    assert run_cli("store", "pull", "me/latents", tmp_path / "copy") == 0
    same(LatentDataset(tmp_path / "copy"), LatentDataset(store))

    commits = len(Hub.commits)
    with torch.no_grad():
        tiny_vae.encoder.conv_in.weight.mul_(2)
    write_store(tiny_vae, Pictures(10), tmp_path / "other", **SETTINGS)
    store_push.push(store_push.plan_push(tmp_path / "other", "me/latents"))
    assert Hub.commits[commits] == ["manifest.json"], "what is about to be overwritten is no store meanwhile"
    assert {path for path in Hub.received if path.startswith("shards/")} == set(shard_files(tmp_path / "other"))
    same(LatentDataset(URL), LatentDataset(tmp_path / "other"))
    with refused(UsageError, "OUT"):
        plan_pull(URL, tmp_path / "copy")


def test_an_interrupted_pull_goes_on_and_damage_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_push.push(store_push.plan_push(folder / "latents", "me/latents"))
    good = Hub.received["shards/00000001.safetensors"]
    Hub.received["shards/00000001.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    out = tmp_path / "copy"
    assert run_cli("store", "pull", "me/latents", out) == 1
    assert "00000001.safetensors: its checksum is not the manifest's" in capsys.readouterr().err
    assert not (out / "manifest.json").exists() and not (out / "shards" / "00000001.safetensors").exists()
    (out / "shards" / ".00000002.arrow.77.tmp").write_bytes(b"of a pull that was killed")
    Hub.received["shards/00000001.safetensors"] = good
    assert run_cli("store", "pull", "me/latents", out) == 0
    assert shard_files(out) == shard_files(folder / "latents")
    damaged = shutil.copytree(folder / "latents", tmp_path / "damaged")
    (damaged / "shards" / "00000002.parquet").write_bytes(b"x")
    Hub.received.clear()
    with refused(WorkError, "00000002.parquet"):
        store_push.push(store_push.plan_push(damaged, "me/another"))


def test_a_url_is_pulled_as_well_and_wrong_calls_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").put(str(folder / "latents"), "/pulled/latents", recursive=True)
    assert run_cli("store", "pull", "memory://pulled/latents", tmp_path / "copy") == 0
    assert read_manifest(tmp_path / "copy") == read_manifest(folder / "latents")
    for call, sentence in (
        (("pull", "memory://pulled/latents", tmp_path / "new", "--revision", "v1"), "--revision: goes with owner/name"),
        (("pull", "memory://pulled/latents", tmp_path), "expected a new folder"),
        (("push", folder / "latents", "a b"), "REPO_ID a b: expected owner/name"),
        (("push", folder, "me/latents"), "no manifest.json there"),
        (("pull", "me/nothing", tmp_path / "new"), "no manifest.json there"),
    ):
        assert run_cli("store", *call) == 2
        assert sentence in capsys.readouterr().err
