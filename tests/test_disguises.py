"""Files that are something else than their names say, wherever a file of somebody else's is opened: a git-LFS pointer,
a web page, a hub's answer, nothing at all. The sentence, or the reason of the quarantine, says which."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from fork_server import fork
from images import write_images
from placeholder_files import PAGE, POINTER
from store_sources import Pictures
from stores import SETTINGS
from training_runs import write_config

from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.validation import disguise
from ldm_vae.data.decoding import BadImage, decode, read_size
from ldm_vae.data.source import open_source
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.diffusion.flow import Denoiser, SamplingConfig
from ldm_vae.diffusion.generator import CALL, FOLDER, Generator
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.perceptual.features import dinov2, inception
from ldm_vae.perceptual.pretrained import load_lpips
from train import autoencoder as training_program

DISGUISES = {
    "git lfs pull": POINTER,
    "git annex get": b"/annex/objects/SHA256E-s33--4d7a.png\n",
    "HTML": PAGE,
    "Entry not found": b"Entry not found",
    "is empty": b"",
    "zeros": bytes(4096),
}
REFUSED = (UsageError, WorkError)


def said_by(call: Callable[[], Any]) -> str:
    with pytest.raises(REFUSED) as refused:
        call()
    said = str(refused.value)
    assert "\n" not in said and len(said) < 1000
    return said


@pytest.mark.parametrize("told", DISGUISES)
def test_a_picture(told: str, image_folder: Path) -> None:
    content = DISGUISES[told]
    for read in (decode, read_size):
        with pytest.raises(BadImage) as bad:
            read(content)
        assert told in bad.value.reason.replace("the file is empty", "is empty")
    (image_folder / "img_0003.png").write_bytes(content)
    source = open_source(str(image_folder))
    record = source[3]
    with pytest.raises(BadImage):
        decode(record.image)


def test_a_picture_is_no_disguise(image_folder: Path) -> None:
    assert [disguise(path.read_bytes()[:512]) for path in image_folder.glob("*.png")] == [None] * 12
    assert disguise(b"<svg/>") is None and disguise(b"\x93NUMPY") is None and disguise(b"\0" * 8 + b"x") is None


def test_pointers_among_pictures_are_quarantined_by_that_reason(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "img_0003.png").write_bytes(POINTER)
    assert run_cli("encode", tiny_vae_folder, image_folder, tmp_path / "store", "--resolution", "32") == 0
    (line,) = (tmp_path / "store" / "quarantine.jsonl").read_text().splitlines()
    assert "git lfs pull" in json.loads(line)["reason"]


@pytest.mark.parametrize("told", DISGUISES)
def test_files_of_a_store(told: str, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(), tmp_path / "whole", **SETTINGS)
    for name in ("shards/00000000.safetensors", "shards/00000000.arrow", "shards/00000000.parquet", "manifest.json"):
        store = Path(shutil.copytree(tmp_path / "whole", tmp_path / "store", dirs_exist_ok=True))
        (store / name).unlink()
        (store / name).write_bytes(DISGUISES[told])
        if name.endswith("parquet"):
            (store / name).with_suffix(".arrow").unlink()
        said = said_by(lambda store=store: LatentDataset(store)[0])  # type: ignore[misc]
        assert told in said.replace("the file is empty", "is empty") and Path(name).name in said
        if name != "manifest.json":
            assert verify(store)
        else:
            assert told in said_by(lambda store=store: read_manifest(store))  # type: ignore[misc]


@pytest.mark.parametrize("told", DISGUISES)
def test_archives_and_other_formats(told: str, image_folder: Path, tmp_path: Path) -> None:
    for name in ("data.zip", "data.parquet"):
        (tmp_path / name).write_bytes(DISGUISES[told])
        assert told in said_by(lambda name=name: open_source(str(tmp_path / name)))  # type: ignore[misc]
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(image_folder / "img_0000.png", "img_0000.png")
    assert len(open_source(str(tmp_path / "data.zip"))) == 1


@pytest.mark.parametrize("told", DISGUISES)
def test_weights_of_the_measures(told: str, tmp_path: Path) -> None:
    for name in ("vgg16.pth", "vgg16.safetensors"):
        (tmp_path / name).write_bytes(DISGUISES[told])
        assert told in said_by(lambda name=name: load_lpips("vgg", str(tmp_path / name)))  # type: ignore[misc]
    assert told in said_by(lambda: inception(tmp_path / "vgg16.pth", torch.device("cpu")))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    shape = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_dinov2(name: str, dino: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert dinov2(str(dino), cpu).trunk(torch.rand(1, 3, 32, 32) * 255).shape == (1, 8)
    for told, content in DISGUISES.items():
        folder = Path(shutil.copytree(dino, tmp_path / "dino", dirs_exist_ok=True))
        (folder / name).write_bytes(content)
        assert told in said_by(lambda folder=folder: dinov2(str(folder), cpu))  # type: ignore[misc]
    (folder / name).write_bytes((dino / name).read_bytes()[:-40])
    assert str(folder) in said_by(lambda: dinov2(str(folder), cpu))


def test_a_dinov2_that_is_not_whole_is_not_filled_by_chance(dino: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(dino, tmp_path / "dino"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layernorm.weight"))
    save_file({n: v for n, v in tensors.items() if n != gone}, folder / "model.safetensors", metadata={"format": "pt"})
    assert gone in said_by(lambda: dinov2(str(folder), torch.device("cpu")))


# --- a denoiser -------------------------------------------------------------------------------------------------------


def generator(vae: AutoencoderKL) -> Generator:
    torch.manual_seed(0)
    network = DiT(patch_size=1, num_layers=1, num_attention_heads=2, attention_head_dim=8).build(4, (4, 4), 1)
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return Generator(Denoiser(network, 0).eval(), vae, (4, 4, 4), Normalisation(1.0), SamplingConfig(steps=2))


def test_a_denoiser_is_loaded_to_the_bit_or_refused(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    made = generator(tiny_vae)
    made.write(tmp_path / "whole")
    loaded = Generator.load(tmp_path / "whole", tiny_vae)
    assert torch.equal(loaded.latents([0, 1]), made.latents([0, 1]))
    weights = "diffusion_pytorch_model.safetensors"
    for name in (weights, "config.json", CALL):
        for told, content in DISGUISES.items():
            run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run", dirs_exist_ok=True))
            (run / FOLDER / name).write_bytes(content)
            said = said_by(lambda run=run: Generator.load(run, tiny_vae))  # type: ignore[misc]
            assert told in said and name in said
    for name, content in ((CALL, b"{}"), (CALL, b"[" * 100_000), ("config.json", b'{"_class_name": "os"}')):
        run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run", dirs_exist_ok=True))
        (run / FOLDER / name).write_bytes(content)
        assert name in said_by(lambda run=run: Generator.load(run, tiny_vae))  # type: ignore[misc]


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["init_from", "losses", "perturbations"])
def test_a_training_refuses_such_a_base_or_teacher(
    where: str, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tiny_vae_folder / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    changes: dict[str, object] = {
        "init_from": {"init_from": str(tiny_vae_folder)},
        "losses": {"losses": {"l1": {}, "drift": {"teacher": str(tiny_vae_folder)}}},
        "perturbations": {"perturbations": {"teacher_latents": {"teacher": str(tiny_vae_folder)}}},
    }[where]  # type: ignore[assignment]
    done = fork(training_program.main, [str(write_config(tmp_path, image_folder, **changes))]).wait()  # type: ignore[arg-type]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "git lfs pull" in done.stderr and str(tiny_vae_folder) in done.stderr
    assert not (tmp_path / "run").exists()


PROGRAMS = {
    "evaluate": ("evaluate", "VAE", "IMAGES", "--output", "OUT", "--resolution", "32"),
    "latent_space": ("latent_space", "VAE", "IMAGES", "--output", "OUT", "--resolution", "32"),
    "decode": ("decode", "STORE", "OUT", "--vae", "VAE"),
    "drift_from": ("export", "GOOD", "OUT", "--stats", "IMAGES", "--drift_from", "VAE", "--resolution", "32"),
    "normalisation_from": ("export", "GOOD", "OUT", "--normalisation_from", "VAE"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_names_such_a_vae(
    program: str, tiny_vae: AutoencoderKL, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tiny_vae, Pictures(), tmp_path / "store", **SETTINGS)
    vae = Path(shutil.copytree(tiny_vae_folder, tmp_path / "damaged"))
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    places = {
        "VAE": vae, "GOOD": tiny_vae_folder, "IMAGES": write_images(tmp_path / "images", 2),
        "STORE": tmp_path / "store", "OUT": tmp_path / "out",
    }  # fmt: skip
    status = run_cli(*[places.get(word, word) for word in PROGRAMS[program]])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert "git lfs pull" in lines[0] and str(vae) in lines[0]
    assert not (tmp_path / "out").exists()


def test_arrays_are_no_disguise() -> None:
    assert decode(np.zeros((4, 4, 3), np.uint8)).sum() == 0
