"""`ldm-vae encode`, `store` and `decode` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from images import write_images
from PIL import Image
from sentences import refused

from ldm_vae import LatentDataset
from ldm_vae.cli import parser
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import read_manifest


def call(*words: object) -> None:
    arguments = parser().parse_args([str(word) for word in words])
    arguments.run(arguments)


@pytest.fixture
def store(tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> Path:
    (image_folder / "notes.png").write_text("not a picture")
    out = tmp_path / "latents"
    call("encode", tiny_vae_folder, image_folder, out, "--resolution", 32, "--batch_size", 4, "--num_workers", 0)
    return out


def test_jpeg_draft_is_part_of_what_a_store_is(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number, path in enumerate(sorted(write_images(tmp_path / "png", 3, (150, 170)).iterdir())):
        Image.open(path).save(photographs / f"{number}.jpg", quality=80)
    options = ("--resolution", 32, "--batch_size", 4, "--num_workers", 0)
    exact, draft = tmp_path / "exact", tmp_path / "draft"
    call("encode", tiny_vae_folder, photographs, exact, *options)
    call("encode", tiny_vae_folder, photographs, draft, *options, "--jpeg_draft")
    assert read_manifest(draft).identity.preprocessing == "1 jpeg_draft=True"
    one, other = (LatentDataset(store, raw=True)[0]["mean"] for store in (exact, draft))
    assert 0 < (one - other).abs().max() < 0.5  # other pixels, of the same photograph
    with refused(UsageError, "preprocessing") as error:
        call("encode", tiny_vae_folder, photographs, exact, *options, "--jpeg_draft")
    assert "is 1, not 1 jpeg_draft=True" in str(error.value)
    with refused(UsageError, "preprocessing") as error:
        call("encode", tiny_vae_folder, photographs, draft, *options)
    assert "is 1 jpeg_draft=True, not 1" in str(error.value)
    call("store", "verify", draft, "--reencode", 3)  # decodes as the store says
    assert "3 samples encoded again, 3 to the same bits" in capsys.readouterr().out


def test_encode_into_a_store_of_older_pictures(store: Path, tiny_vae_folder: Path, image_folder: Path) -> None:
    options = ("--resolution", 32, "--batch_size", 4, "--num_workers", 0)
    call("encode", tiny_vae_folder, image_folder, store, *options, "--check", "contents")
    shutil.copy(image_folder / "img_0001.png", image_folder / "img_0002.png")
    for check in ((), ("--check", "contents"), ("--check", "size")):
        with pytest.raises(UsageError, match=r"img_0002\.png"):  # and its size as a PNG, so not golden
            call("encode", tiny_vae_folder, image_folder, store, *options, *check)
    call("encode", tiny_vae_folder, image_folder, store, *options, "--update")
    call("encode", tiny_vae_folder, image_folder, store, *options)
    data = LatentDataset(store)
    images = dict(zip(data.column("key"), data.column("image_sha256"), strict=True))
    assert images["img_0001.png"] == images["img_0002.png"]


def test_encode_then_stats_verify_and_decode(
    store: Path, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(LatentDataset(store)) == 12
    call("store", "stats", store)
    shown = capsys.readouterr().out
    assert "quarantined  1" in shown and "scaling_factor" in shown and "latent shape 4x16x16" in shown
    call("store", "stats", store, "--json")
    assert json.loads(capsys.readouterr().out)["statistics"]["images"] == 12
    call("store", "verify", store)
    assert "1 shards with 12 samples are sound" in capsys.readouterr().out
    call("decode", store, tmp_path / "pictures", "--count", 3, "--first", 2)
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert [path.name for path in pictures] == [f"{i:08d}-img_{i:04d}.png" for i in (2, 3, 4)]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (32, 32)
    shutil.move(tiny_vae_folder, tmp_path / "moved")
    with refused(UsageError, "--vae"):
        call("decode", store, tmp_path / "pictures")
    call("decode", store, tmp_path / "again", "--vae", tmp_path / "moved", "--count", 1)
    assert len(list((tmp_path / "again").glob("*.png"))) == 1


def test_verify_names_the_damaged_file(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = store / "shards" / "00000000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with refused(WorkError, "shards/00000000.safetensors") as error:
        call("store", "verify", store)
    assert "1 problem" in str(error.value)
    assert "bits have changed" in capsys.readouterr().out


def test_wrong_calls_say_what_is_wrong(store: Path, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    with refused(UsageError, "resolution") as error:
        call("encode", tiny_vae_folder, image_folder, tmp_path / "x", "--resolution", 33)
    assert "f = 2, got 33" in str(error.value)
    with refused(UsageError, "batch_size") as error:
        call("encode", tiny_vae_folder, image_folder, tmp_path / "x", "--resolution", 32, "--batch_size", 0)
    assert "at least 1, got 0" in str(error.value)
    with refused(UsageError, "max_bad"):
        call("encode", tiny_vae_folder, image_folder, tmp_path / "x", "--resolution", 32, "--max_bad", 2)
    with refused(UsageError, "nowhere"):
        call("encode", tiny_vae_folder, tmp_path / "nowhere", tmp_path / "x", "--resolution", 32)
    with refused(UsageError, "--first") as error:
        call("decode", store, tmp_path / "x", "--first", 12)
    assert "0 to 11, got 12" in str(error.value)
    assert not (tmp_path / "x").exists()
