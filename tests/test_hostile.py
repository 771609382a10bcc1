"""Files that mean harm: pickles as weights, headers and manifests with absurd numbers, bombs, tags, climbing paths.

Nothing executes, nothing is written outside of its folder, memory stays bounded, and every refusal is one sentence.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from images import write_images
from PIL import Image
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS
from tiny_classes import tiny
from training_runs import write_config

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core import config, config_file
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.validation import check_model_config
from ldm_vae.data.ordered import ordered_loader
from ldm_vae.data.source import Record, open_source
from ldm_vae.export.recipe import read_recipe
from ldm_vae.latent_store import read_manifest, write_store
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.perceptual.pretrained import load_lpips
from ldm_vae.run import checkpoint
from ldm_vae.training.config import Training

pytestmark = pytest.mark.usefixtures("bounded_memory")

DEEP = 100_000


class Canary:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `ldm-vae` says when it refuses: one sentence, status 1 or 2."""
    capsys.readouterr()
    status = run_cli(*arguments)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and len(lines) == 1 and "Traceback" not in said, said
    assert len(lines[0]) < 2000
    return lines[0]


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae.ckpt", "vae.pt", "vae.PTH", "vae.bin", "vae.safetensors"])
def test_a_pickle_as_weights_does_not_execute(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    struck = tmp_path / "struck"
    for number, save in enumerate([pickle.dumps, as_torch_saves]):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(save({"state_dict": Canary(struck)}))
        out = tmp_path / "out"
        assert str(path) in refusal(capsys, "export", path, out)
        assert str(path) in refusal(capsys, "export", path, out, "--weights_only_pickle")
        assert str(path) in refusal(capsys, "encode", path, tmp_path, out, "--resolution", "32")
        assert not struck.exists() and not out.exists()
    pickle.loads(pickle.dumps(Canary(struck)))
    assert struck.exists()  # it was armed


def as_torch_saves(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_config_of_more_layers_than_can_be_built_in_time() -> None:
    blocks = {f"{side}_block_types": ["X"] * 100 for side in ("down", "up")}
    check_model_config({"block_out_channels": [4] * 100, "layers_per_block": 2} | blocks)
    with refused(ValueError, "layers_per_block"):
        check_model_config({"block_out_channels": [4] * 100, "layers_per_block": 100} | blocks)


@pytest.mark.parametrize("factor", ["x", None, 0, 0.5])
def test_a_factor_that_nothing_can_be_divided_by_is_refused(factor: Any, tmp_path: Path) -> None:
    tiny("AutoencoderKLWan").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scale_factor_spatial": factor}))
    with refused(UsageError, "scale_factor_spatial"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "preprocessing.json"])
def test_a_file_of_a_network_that_never_ends(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tiny_vae_folder / name
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        put(path)
        assert name in refusal(capsys, "export", tiny_vae_folder, tmp_path / "out")


def test_a_manifest_that_never_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        put(tmp_path / "manifest.json")
        assert "manifest.json" in refusal(capsys, "store", "stats", tmp_path)


def test_a_pickle_in_a_diffusers_folder_does_not_execute(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_vae_folder / "diffusion_pytorch_model.safetensors").unlink()
    (tiny_vae_folder / "diffusion_pytorch_model.bin").write_bytes(as_torch_saves(Canary(tmp_path / "struck")))
    assert "diffusion_pytorch_model.bin" in refusal(capsys, "export", tiny_vae_folder, tmp_path / "out")
    with refused(UsageError, "diffusion_pytorch_model.bin"):
        load_lpips("alex", tiny_vae_folder / "diffusion_pytorch_model.bin")
    assert not (tmp_path / "struck").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9}, {"layers_per_block": 10**400}, {"latent_channels": 2**62},
        {"block_out_channels": [8] * 10**5}, {"block_out_channels": [10**12, 16]}, {"block_out_channels": "no"},
        {"block_out_channels": [2**16, 2**16]}, {"norm_num_groups": 0}, {"norm_num_groups": -4}, {"in_channels": None},
        {"act_fn": "os.system"}, {"scaling_factor": "nothing"}, {"scaling_factor": float("nan")},
        {"latents_mean": [0.0] * 99}, {"_class_name": "os.system"}, {"_class_name": ["x"]},
        {"down_block_types": ["DownEncoderBlock2D"]},
        {"sample_size": 10**30},
    ],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_a_config_of_an_absurd_network(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    path = tiny_vae_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert str(tiny_vae_folder) in refusal(capsys, "export", tiny_vae_folder, tmp_path / "out")
    shutil.copy(tiny_vae_folder / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors")
    if "_class_name" not in change:  # a single file is always an AutoencoderKL
        refusal(capsys, "export", tmp_path / "one.safetensors", tmp_path / "out", "--config", tiny_vae_folder)
    assert not (tmp_path / "out").exists()


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_brackets(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "[" * DEEP
    write_store(tiny_vae, Pictures(), tmp_path / "store", **SETTINGS)
    (tmp_path / "store" / "manifest.json").write_text(deep)
    assert "nested too deeply" in refusal(capsys, "store", "stats", tmp_path / "store")
    (tiny_vae_folder / "latent_statistics.json").write_text(deep)
    assert "nested too deeply" in refusal(capsys, "export", tiny_vae_folder, tmp_path / "out")
    (tiny_vae_folder / "config.json").write_text(deep)
    assert str(tiny_vae_folder) in refusal(capsys, "export", tiny_vae_folder, tmp_path / "out")
    (tmp_path / "metrics.json").write_text(deep)
    assert "nested too deeply" in refusal(capsys, "report", tmp_path)
    (tmp_path / "quarantine.jsonl").write_text(deep)
    folder = tmp_path / "checkpoints" / "images-000000001"
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text(deep)
    said: list[str] = []
    assert checkpoint.newest(folder.parent, said.append) is None and "nested too deeply" in said[0]


# each line ten times the one before: 10^9 values
LAUGHS = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])


@pytest.mark.parametrize(
    "text",
    [
        "output_dir: !!python/object/apply:os.mkdir [STRUCK]",
        "output_dir: !!python/name:os.system",
        "output_dir: !!python/module:this",
        "a: " + "[" * 2000,
        "output_dir: \x00",
        "output_dir: 2026-13-45",
    ],
)
def test_yaml_that_means_harm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("STRUCK", str(tmp_path / "struck")))
    with pytest.raises(UsageError, match=r"config\.yaml") as error:  # and PyYAML's words, so not golden
        config.load(Training, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not (tmp_path / "struck").exists()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (LAUGHS, "config.yaml"),
        ("losses: &a {l1: *a}", "config.yaml"),
        ("include: config.yaml", "config.yaml"),
        ("include: {a: 1}", "include"),
        ("include: [/dev/zero]", "/dev/zero"),
        ("1: 2", "`1`"),
    ],
)
def test_yaml_without_an_end_or_a_section(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with refused(UsageError, field) as error:
        config.load(Training, path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_aliases_of_a_few_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: &photos {kind: folder, path: p}\nvalidation_data: {<<: *photos, path: q}\nlosses: {}\n")
    read = config_file.read_yaml(path)
    assert read["data"] == {"kind": "folder", "path": "p"} and read["validation_data"] == read["data"] | {"path": "q"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Counter:
    """Something with a state."""

    def __init__(self) -> None:
        self.value = torch.zeros(3)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.value = state["value"] + 0


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["objects"].pop("counter"), lambda state: state.pop("info"),
        lambda state: state["info"].update(images_seen="many"), lambda state: state["info"].update(images_seen=None),
        lambda state: state["objects"].update(counter={"tensor": "nowhere"}),
        lambda state: state["objects"].update(counter={"a": 1, "b": 2}),
        lambda state: state["objects"].update(counter={"dict": [[1], 2]}), lambda state: state.clear(),
    ],
)  # fmt: skip
def test_a_checkpoint_that_was_tampered_with(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Its checksums are right: whoever tampered with it wrote them too."""
    saved = checkpoint.save(tmp_path, 5, {"counter": Counter()}, "", {"images_seen": 5, "global_batch": 1})
    state = json.loads((saved / "state.json").read_text())
    change(state)
    (saved / "state.json").write_text(json.dumps(state))
    sums = {name: checkpoint._sha256(saved / name) for name in checkpoint.FILES}
    (saved / "checksums.json").write_text(json.dumps(sums))
    assert checkpoint.newest(tmp_path) == saved
    with pytest.raises(WorkError, match="images-000000005") as error:  # and Python's words, so not golden
        checkpoint.load(saved, {"counter": Counter()})
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_vouches_for_half_of_itself_is_damaged(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 5, {"counter": Counter()}, "", {"images_seen": 5, "global_batch": 1})
    sums = json.loads((saved / "checksums.json").read_text())
    for kept in ({}, {"../../x": "0"}, {name: sums[name] for name in ("state.json", "config.yaml")}, []):
        (saved / "checksums.json").write_text(json.dumps(kept))
        assert checkpoint.newest(tmp_path) is None


# --- images and archives ----------------------------------------------------------------------------------------------

SIDE = 100_000  # 10^10 pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def enormous() -> dict[str, bytes]:
    """Headers of 10^10 pixels (a GIF, a TIFF and a WebP as many as they can say), and a little behind them."""
    body = zlib.compress(bytes(10**6))
    tiff = [(256, 4, SIDE), (257, 4, SIDE), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, SIDE),
            (279, 4, 100)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tiff)
    return {
        "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", body) + chunk(b"IEND", b""),
        "bmp": struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, SIDE, SIDE, 1, 24, 0, 0, 0, 0, 0, 0),
        "ppm": b"P6 %d %d 255\n" % (SIDE, SIDE),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;",
        "tif": struct.pack("<2sHIH", b"II", 42, 8, len(tiff)) + entries + bytes(4),
        "npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 100000, 3), }".ljust(117) + b"\n",
    }  # fmt: skip


def test_images_of_ten_thousand_million_pixels_and_bombs_are_quarantined(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", 2)
    for extension, data in enormous().items():
        (images / f"enormous.{extension}").write_bytes(data)
    out = tmp_path / "store"
    assert run_cli("encode", tiny_vae_folder, images, out, "--resolution", "32", "--num_workers", "0") == 0
    assert read_manifest(out).samples == 2
    bad = {entry.key: entry.reason for entry in read_quarantine(out)}
    assert set(bad) == {f"enormous.{extension}" for extension in enormous()}
    assert all("\n" not in reason for reason in bad.values())
    assert "Traceback" not in capsys.readouterr().err


def test_a_tar_that_unpacks_to_too_much_and_climbs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_vae.data.sources.webdataset.MAX_BYTES", 2 << 20)  # of 1 GiB
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    path = tmp_path / "data" / "bomb.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in ("good.png", "../../climbs.png", "/absolute.png"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        bomb = tarfile.TarInfo("bomb.png")
        bomb.size = 3 << 20
        archive.addfile(bomb, io.BytesIO(bytes(bomb.size)))
    before = tree(tmp_path)
    good, bad = [], []
    for samples, quarantined in ordered_loader(open_source(path, kind="webdataset"), 8, batch_size=2):
        good += [sample.key for sample in samples]
        bad += quarantined
    assert [key.rpartition("/")[2] for key in good] == ["good"]
    assert len(bad) == 4 and any("the limit is" in entry.reason for entry in bad)
    assert tree(tmp_path) == before


def test_keys_that_climb_out_stay_in_the_folder(tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path) -> None:
    class Climbing(Pictures):
        def key(self, index: int) -> str:
            return ["../../../evil", "/etc/evil", "a/../../../b", "\x00", "..", ""][index]

        def __getitem__(self, index: int) -> Record:
            return Record(self.key(index), self.pixels(index), {})

    write_store(tiny_vae, Climbing(6), tmp_path / "inner" / "store", **SETTINGS)
    before = tree(tmp_path)
    out = tmp_path / "inner" / "pictures"
    assert run_cli("decode", tmp_path / "inner" / "store", out, "--vae", tiny_vae_folder) == 0
    written = {name for name in tree(tmp_path).keys() - before.keys() if name.endswith(".png")}
    assert len(written) == 6 and all(name.startswith("inner/pictures/") for name in written)


@pytest.mark.slow
def test_a_run_folder_that_is_no_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, images)
    (tmp_path / "config.yaml").write_text("a: " + "[" * 2000)
    assert "not readable as YAML" in refusal(capsys, "report", tmp_path)
    with refused(UsageError, str(tmp_path)):
        load_autoencoder(tmp_path)
    with pytest.raises(UsageError, match=r"config\.yaml"):  # and Python's words, so not golden
        read_recipe(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\nlosses: {l1: {weight: 1.0}}")
    (tmp_path / "metrics.jsonl").write_text('{"images": 8, "seconds": 1.0}\n{"images": 16, "sec')  # as a kill leaves it
    assert "Training" in read_recipe(tmp_path).sections
    number = "9" * 400
    lines = [f'{{"images": 16, "loss/l1": {number}}}', f'{{"images": {number}}}', '{"images": null}', "[1]", "7", "NaN"]
    (tmp_path / "metrics.jsonl").write_text('{"images": 8, "seconds": 1.0, "loss/l1": 0.5}\n' + "\n".join(lines))
    assert run_cli("report", tmp_path) == 0
    shutil.rmtree(tmp_path / "report")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text("[" * DEEP)
    with refused(UsageError, "metrics.json"):
        read_recipe(tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 2)
