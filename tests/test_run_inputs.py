"""A run that goes on with other pictures, or another store, under the same name says so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import diffusion_runs
import pytest
import training_runs
from diffusers import AutoencoderKL
from image_files import COUNT, KINDS, bmp, pictures, set_back, times, write
from images import write_images
from store_sources import Album

from ldm_vae.data import inventory
from ldm_vae.data.inventory import Difference, Inventory, compare, take_inventory
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import write_store

pytestmark = pytest.mark.usefixtures("settled_files")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusion_runs.write_materials(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize("kind", KINDS)
def test_another_picture_under_its_name_is_found_and_a_touched_one_is_not(kind: str, tmp_path: Path) -> None:
    data, file = write(kind, tmp_path / "data", pictures()), tmp_path / "inventory.safetensors"
    take_inventory(open_source(data)).save(file)

    def difference() -> Difference:
        before = Inventory.load(file)
        assert before is not None
        return compare(before, open_source(data))[0]

    assert not difference()
    for path in (tmp_path / "data").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert not difference()
    were = times(tmp_path / "data")
    write(kind, tmp_path / "data", pictures(img_3=bmp(33)))
    set_back(were)
    found = difference()
    assert (found.changed, found.new, found.gone, found.unknown) == (1, 0, 0, 0) and "3" in found.first
    write(kind, tmp_path / "data", pictures(img_3=bmp(33), img_1=bmp(1, side=24)))
    assert difference().changed == 2


def test_names_that_came_and_went(tmp_path: Path) -> None:
    before = take_inventory(Album(numbers=(1, 2, 3, 4)))
    found, _ = compare(before, Album(numbers=(2, 3, 7, 4), content={4: 40}))
    assert (found.changed, found.new, found.gone, found.unknown) == (1, 1, 1, 0) and found.first == "img_007"
    assert not compare(before, Album(numbers=(4, 3, 2, 1)))[0]


def test_what_was_not_read_and_was_copied_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "GIGABYTE", 2 * len(bmp(0)))
    data = write("folder", tmp_path / "data", pictures())
    before = take_inventory(open_source(data))
    assert (before.contents > 0).tolist() == [True] * 2 + [False] * (COUNT - 2)
    assert not compare(before, open_source(data))[0]
    shutil.copytree(data, tmp_path / "copy")
    assert compare(before, open_source(tmp_path / "copy"))[0] == Difference(unknown=COUNT - 2)


@pytest.mark.slow
def test_a_training_says_that_its_pictures_are_others(tmp_path: Path) -> None:
    config = training_runs.write_config(tmp_path, write_images(tmp_path / "images", 5), max_train_images=16)
    assert training_runs.run(config).returncode == 0
    (tmp_path / "images" / "img_0002.png").write_bytes((tmp_path / "images" / "img_0003.png").read_bytes())
    done = training_runs.run(config)
    assert done.returncode == 0 and "1 have changed (the first: img_0002.png)" in done.stderr
    (tmp_path / "run" / "inventory" / "data.safetensors").unlink()  # a run of an older version
    done = training_runs.run(config)
    assert done.returncode == 0 and "warning: data: nothing says" in done.stderr


def test_a_diffusion_training_says_that_its_store_is_another(
    home: Path, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    shutil.copytree(home / "plain", tmp_path / "latents")
    config = diffusion_runs.write_config(tmp_path, tmp_path / "latents", max_train_images=16, vae=str(home / "vae"))
    for _ in range(2):
        done = diffusion_runs.run(config)
        assert done.returncode == 0 and "warning: " not in done.stderr, done.stderr
    shutil.rmtree(tmp_path / "latents")
    vae = AutoencoderKL.from_pretrained(home / "vae").eval()
    other = write_images(tmp_path / "images", 5, size=(24, 20))
    write_store(vae, open_source(other), tmp_path / "latents", resolution=16, batch_size=4, vae_name=str(home / "vae"))
    done = diffusion_runs.run(config, "--max_train_images", "24")
    assert done.returncode == 0 and "warning: latents: not the store that this run began with" in done.stderr
