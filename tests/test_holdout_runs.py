"""Runs that hold images out by key, and what is asked of their networks afterwards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import training_runs
from cli_call import call, program
from diffusers import AutoencoderKL
from image_files import photograph
from PIL import Image
from sentences import refused
from splits import NOTHING, keys, split
from store_sources import Album, Pictures

import ldm_vae
from eval import reconstruction
from ldm_vae.autoencoder.preparation import plain, preparation_of, record, recorded
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.holdout import is_held_out, numbers_of, record_of
from ldm_vae.data.inventory import Inventory
from ldm_vae.data.preprocessing import Preprocessing
from ldm_vae.data.source import open_source
from ldm_vae.data.stamps import key_numbers
from ldm_vae.latent_store import LatentDataset
from ldm_vae.training.config import Training
from ldm_vae.training.dry_run import describe
from ldm_vae.training.scaling import _images

SHARE = 0.3
PARTS = {"train": "data", "holdout": "validation_data"}


def named(first: str, held_out: bool) -> str:
    """A name, beginning so, of an image that is held out or not."""
    for number in range(100):
        name = f"{first}_{number}.jpg"
        if bool(is_held_out(numbers_of(_Names([name, *map(str, range(40))])), SHARE)[0]) == held_out:
            return name
    raise AssertionError


class _Names(Pictures):
    def __init__(self, names: list[str]) -> None:
        super().__init__(len(names))
        self.names = names

    def key(self, index: int) -> str:
        return self.names[index]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, a small copy of a held-out one among the training's, and of a training's among the held-out."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for number in range(12):
        photograph(number, 64).save(folder / f"{number:02d}.png")
    train, held = split(open_source(folder), SHARE)
    with Image.open(folder / held[0]) as picture:
        picture.resize((40, 40)).save(folder / named("copy", False), quality=80)
    with Image.open(folder / train[0]) as picture:
        picture.resize((40, 40)).save(folder / named("original", True), quality=80)
    return folder


def written(tmp_path: Path, photos: Path, **data: Any) -> Path:
    return training_runs.write_config(
        tmp_path, photos, data={"kind": "folder", "path": str(photos), "holdout": SHARE} | data, max_train_images=8,
        checkpoint_every_images=4, validate_every_images=4, validation_metrics=["psnr"], best_metric="psnr",
        log_every_images=4, normalisation_images=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that held images out."""
    folder = tmp_path_factory.mktemp("home")
    done = training_runs.run(written(folder, photos))
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def inventory(run: Path, name: str) -> set[int]:
    found = Inventory.load(run / "inventory" / f"{name}.safetensors")
    assert found is not None
    return {*found.keys.tolist()}


def key_set(photos: Path, names: list[str]) -> set[int]:
    numbers = dict(zip(keys(source := open_source(photos)), key_numbers(source).tolist(), strict=True))
    return {numbers[name] for name in names}


def test_a_run_trains_on_what_it_does_not_hold_out(home: Path, photos: Path) -> None:
    train, held = split(open_source(photos), SHARE)
    copied = [named("copy", False), next(name for name in train if name != named("copy", False))]
    original = [next(name for name in held if name != named("original", True)), named("original", True)]
    run = home / "run"
    assert inventory(run, "validation_data") == key_set(photos, held)
    assert inventory(run, "data") == key_set(photos, [name for name in train if name not in copied])
    assert json.loads((run / "inventory" / "holdout.json").read_text())["copies"] == dict(
        zip(sorted(copied), [dict(zip(copied, original, strict=True))[name] for name in sorted(copied)], strict=True)
    )
    said = (home / "said.txt").read_text()
    assert f"{len(held)} of 14 images are held out, {len(train) - 2} train" in said
    assert "2 copies of held-out images are left out" in said and f"{copied[0]} (of {original[0]})" in said
    log = training_runs.metrics(run)
    assert any("validation/psnr" in line for line in log)
    measured = json.loads((run / "report" / "metrics.json").read_text())
    assert measured["data"]["images"] == len(held) and measured["data"]["source"] == f"{photos}, held out"


def test_the_split_goes_with_the_weights(home: Path, photos: Path) -> None:
    network = ldm_vae.load_autoencoder(home / "run")
    record = recorded(network)
    assert record is not None and record.holdout is not None and len(record.holdout.left_out) == 2
    settings = config.load(Training, home / "config.yaml")
    assert sum(len(batch) for batch in _images(settings, record)) == len(inventory(home / "run", "data"))
    (checkpoint,) = (home / "run" / "checkpoints").glob("images-*8")
    assert recorded(ldm_vae.load_autoencoder(checkpoint)) == record
    call("export", home / "run", home / "exported")
    assert recorded(ldm_vae.load_autoencoder(home / "exported")) == record
    for part, name in (("train", "data"), ("holdout", "validation_data")):
        found = ldm_vae.open_images(photos, network, part=part)  # type: ignore[arg-type]
        assert {*key_numbers(found).tolist()} == inventory(home / "run", name)


def test_a_record_without_a_split_is_as_before() -> None:
    assert "holdout" not in json.loads(Preprocessing.of(Decoding()).to_bytes())


def test_verbs_take_a_part(home: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "run"
    sizes = {part: len(inventory(run, name)) for part, name in PARTS.items()}
    for part, name in PARTS.items():
        call("encode", run, photos, tmp_path / part, "--resolution", 32, "--num_workers", 0, "--part", part)
        stored = LatentDataset(tmp_path / part, columns=("key",))
        assert key_set(photos, [stored.row(at, ("key",))["key"] for at in range(len(stored))]) == inventory(run, name)
        assert (
            f"part {part}: {sizes[part]} of 14 images, by data.holdout 0.3 of the training" in capsys.readouterr().err
        )
    with refused(UsageError, "OUT"):  # the whole is another set of images
        call("encode", run, photos, tmp_path / "train", "--resolution", 32, "--num_workers", 0)
    program(
        reconstruction, run, run / "vae", photos, "--output", tmp_path / "out", "--resolution", 32, "--metrics", "psnr",
        "--num_workers", 0, "--part", "holdout",
    )  # fmt: skip
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [found["data"]["images"] for found in measured] == [sizes["holdout"]] * 2
    assert "part: holdout, by data.holdout 0.3" in measured[0]["data"]["notes"]
    call("export", run, tmp_path / "new", "--stats", photos, "--part", "train")
    assert f"measured over {sizes['train']} images" in capsys.readouterr().out


def test_parts_that_nothing_says(home: Path, photos: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    ours = DataFlags(part="holdout")
    network = ldm_vae.load_autoencoder(home / "run")
    with refused(UsageError, "--part"):  # no network
        plain(ours).open(photos)
    with refused(UsageError, "--part"):  # no record
        preparation_of({"base": tiny_vae}, ours).open(photos)
    assert len(preparation_of({"base": tiny_vae, "mine": network}, ours).open(photos)) == 4
    other = record(tiny_vae, Preprocessing.of(Decoding(), record_of(numbers_of(Album()), 0.5, NOTHING)))
    with refused(UsageError, "--part"):
        preparation_of({"one": network, "two": other}, ours)
    assert preparation_of({"one": network, "two": other}).kept.holdout is None
    kept = record_of(numbers_of(open_source(photos)), SHARE, NOTHING)
    record(tiny_vae, Preprocessing.of(Decoding(), kept))
    assert len(preparation_of({"one": network, "two": tiny_vae}, ours).open(photos)) == 4
    with refused(UsageError, "--part"):
        preparation_of({"one": network, "two": tiny_vae}, DataFlags(part="train"))
    with refused(UsageError, "data.holdout"):
        open_source(photos, holdout=0.1)
    with refused(UsageError, "--part"):
        call("export", home / "run", tmp_path / "out", "--part", "train")
    with refused(UsageError, "--part"):
        call("fp16", "audit", home / "run", "--part", "train")


def test_images_under_other_names_are_others(
    home: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ldm_vae.load_autoencoder(home / "run")
    shutil.copytree(photos, tmp_path / "above" / "photos")
    with refused(UsageError, "--part"):
        ldm_vae.open_images(tmp_path / "above", network, part="holdout")
    held = ldm_vae.open_images(photos, network, part="holdout")
    for number in range(40, 60):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "above" / "photos" / f"{number}.png")
    (tmp_path / "above" / "photos" / held.key(0)).unlink()
    grown = ldm_vae.open_images(tmp_path / "above" / "photos", network, part="holdout")
    assert {*keys(held)[1:]} < {*keys(grown)}
    assert "which had other images (3 of 4 that were held out are still there)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_goes_on_with_its_split(photos: Path, tmp_path: Path) -> None:
    config_file, kept = written(tmp_path, photos), tmp_path / "run" / "inventory" / "holdout.json"
    assert training_runs.run(config_file).returncode == 0
    found = kept.stat()
    done = training_runs.run(config_file, "--max_train_images", "12")
    assert done.returncode == 0 and "resumed" in done.stdout and "2 copies" in done.stdout
    assert "warning: " not in done.stderr
    assert kept.stat().st_ino == found.st_ino  # no second search
    said = training_runs.one_sentence(training_runs.run(config_file, "--data.holdout", "0.4"), 2)
    assert "data.holdout (was 0.3, now 0.4)" in said
    said = training_runs.one_sentence(training_runs.run(config_file, "--data.holdout_copies", "keep"), 2)
    assert "data.holdout_copies (was leave_out, now keep)" in said


@pytest.mark.slow
def test_two_processes_split_as_one(home: Path, photos: Path, tmp_path: Path) -> None:
    training_runs.run_two(written(tmp_path, photos))
    for name in PARTS.values():
        assert inventory(tmp_path / "run", name) == inventory(home / "run", name)
    ours, theirs = (place / "run" / "inventory" / "holdout.json" for place in (tmp_path, home))
    assert ours.read_bytes() == theirs.read_bytes()


def test_copies_may_be_kept(photos: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    from ldm_vae.training.data import open_sources

    settings = config.load(Training, written(tmp_path, photos, holdout_copies="keep", jpeg_draft=True))
    train, held = open_sources(settings, Accelerator(cpu=True))
    assert held is not None and (keys(train), keys(held)) == split(open_source(photos), SHARE)  # type: ignore[arg-type]
    assert train.decoding.jpeg_draft and not held.decoding.jpeg_draft
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_parts(photos: Path, tmp_path: Path) -> None:
    said = describe(config.load(Training, written(tmp_path, photos)))
    assert "14 images in" in said and "4 of them held out and 10 to train on" in said
    assert "an epoch is 5 updates of 2" in said


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"holdout": 0}}, "data.holdout"),
        ({"data": {"holdout": 1.0}}, "data.holdout"),
        ({"data": {"holdout": math.nan}}, "data.holdout"),
        ({"validation_data": {"kind": "folder", "path": "photos"}}, "data.holdout"),
        ({"data": {"holdout": None}, "validation_data": {"kind": "folder", "path": "x", "holdout": 0.1}},
         "validation_data.holdout"),
        ({"latent_store": "latents", "init_from": "vae"}, "data.holdout"),
    ],
)  # fmt: skip
def test_configs_that_do_not_hold_together(changes: dict[str, Any], field: str, photos: Path, tmp_path: Path) -> None:
    data = {"kind": "folder", "path": str(photos), "holdout": SHARE} | changes.pop("data", {})
    path = training_runs.write_config(tmp_path, photos, data=data, **changes)
    with refused(UsageError, field):
        config.load(Training, path)
