"""Hugging Face datasets: save_to_disk folders, parquet and arrow files; raw bytes, columns, one-sentence errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sentences import refused

from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import decode
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import open_source
from ldm_vae.data.sources.hub import as_image


@pytest.fixture
def dataset(image_folder: Path) -> datasets.Dataset:
    files = sorted(map(str, image_folder.glob("*.png")))
    rows = {"photo": files, "text": [f"picture {i}" for i in range(12)], "n": list(range(12))}
    return datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())


@pytest.fixture(params=["save_to_disk", "parquet", "parquet_folder", "arrow"])
def saved(request: pytest.FixtureRequest, dataset: datasets.Dataset, tmp_path: Path) -> Path:
    if request.param == "save_to_disk":
        dataset.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"
    if request.param == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        return next((tmp_path / "saved").glob("*.arrow"))
    (tmp_path / "shards").mkdir()
    dataset.to_parquet(tmp_path / "shards" / "0.parquet")
    return tmp_path / "shards" / "0.parquet" if request.param == "parquet" else tmp_path / "shards"


def test_every_form_gives_the_same_records(saved: Path, image_folder: Path) -> None:
    source = open_source(saved, caption_column="text")
    assert len(source) == 12
    assert source.columns == ("caption", "n")
    record = source[3]
    assert record.key == source.key(3) == "000000003"
    assert record.image == (image_folder / "img_0003.png").read_bytes()  # not decoded and encoded again
    assert record.columns == {"caption": "picture 3", "n": 3}
    assert pickle.loads(pickle.dumps(source))[3] == record


def test_splits(dataset: datasets.Dataset, tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select(range(2))})
    both.save_to_disk(tmp_path / "both")
    assert len(open_source(tmp_path / "both")) == 12
    assert len(open_source(tmp_path / "both", split="test")) == 2
    with refused(UsageError, "data.split") as error:
        open_source(tmp_path / "both", split="dev")
    assert "train, test" in str(error.value)


def test_columns_are_named_when_they_do_not_exist(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path / "d")
    with refused(UsageError, "data.image_column") as error:
        open_source(tmp_path / "d", image_column="picture")
    assert "photo, text, n" in str(error.value)
    with refused(UsageError, "data.caption_column") as error:
        open_source(tmp_path / "d", caption_column="caption")
    assert "photo, text, n" in str(error.value)
    files = dataset.cast_column("photo", datasets.Image(decode=False))["photo"]
    two = dataset.add_column("other", list(files)).cast_column("other", datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with refused(UsageError, "image_column"):
        open_source(tmp_path / "two")


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data owner/nothing"):
        open_source("owner/nothing")
    with refused(UsageError, "photographs"):
        open_source("photographs")


def test_other_forms_of_images(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [data, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    forms += [str(tmp_path / "a.png"), Image.fromarray(array), array]
    for form in forms:
        assert (decode(as_image(form)).permute(1, 2, 0).numpy() == array).all()
    for nothing, reason in (
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        (3, "an int"),
        ([[1], [1, 2]], "lengths"),
    ):
        with pytest.raises(BadImage, match=reason):
            as_image(nothing)


def test_rows_that_hold_no_image_are_bad(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    gone.write_bytes(b"")
    rows = {"image": [{"bytes": b"junk", "path": None}, {"bytes": None, "path": str(gone)}, None]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    gone.unlink()
    source = open_source(tmp_path / "d.parquet")
    assert source[0].image == b"junk"
    for index in (1, 2):
        with pytest.raises(BadImage):
            source[index]
