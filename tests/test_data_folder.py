"""A folder of images: keys, order, class labels, metadata tables, captions beside the images."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from images import write_images
from PIL import Image
from sentences import refused

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.files import Names, read_bytes
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.source import checksum, open_source
from ldm_vae.data.tree import walk


def put(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)
    return path


def test_keys_are_sorted_posix_paths_and_the_walk_is_recursive(tmp_path: Path) -> None:
    for name in ("b/z.png", "a/deep/er/x.JPG", "c.webp", "b/a.png", ".hidden/h.png", "b/.h.png", "b/notes.md"):
        put(tmp_path / name) if not name.endswith("md") else (tmp_path / name).write_text("text")
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["a/deep/er/x.JPG", "b/a.png", "b/z.png", "c.webp"]
    assert source[1].key == "b/a.png"
    assert source[1].image == (tmp_path / "b/a.png").read_bytes()
    assert source.columns == ()


def test_linked_folders_are_entered_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png")
    put(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    source = open_source(tmp_path / "data")
    assert [source.key(i) for i in range(len(source))] == ["a.png", "linked/x.png"]


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/1.png", "cat/2.png"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.columns == ("label", "label_name")
    assert [source[i].columns for i in range(3)] == [
        {"label": 0, "label_name": "cat"},
        {"label": 0, "label_name": "cat"},
        {"label": 1, "label_name": "dog"},
    ]


def test_folders_of_unequal_depth_are_not_classes(tmp_path: Path) -> None:
    put(tmp_path / "dog/1.png")
    put(tmp_path / "cat/more/1.png")
    assert open_source(tmp_path).columns == ()


ROWS = [{"file_name": "a.png", "text": "an a", "n": 1}, {"file_name": "b.png", "text": 'a "b",\nin two lines', "n": 2}]


def write_metadata(folder: Path, suffix: str) -> None:
    if suffix == "csv":
        (folder / "metadata.csv").write_text(
            'file_name,text,n\na.png,an a,1\nb.png,"a ""b"",\nin two lines",2\n', encoding="utf-8"
        )
    elif suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "metadata.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_tables(tmp_path: Path, suffix: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    write_metadata(tmp_path, suffix)
    source = open_source(tmp_path, caption_column="text")
    assert source.columns == ("caption", "n")
    assert source[1].columns == {"caption": 'a "b",\nin two lines', "n": 2}
    assert source[2].columns == {"caption": None, "n": None}  # not in the table


def test_metadata_of_sub_folders_and_missing_images(tmp_path: Path) -> None:
    put(tmp_path / "x/a.png")
    put(tmp_path / "y/a.png")
    (tmp_path / "x/metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    (tmp_path / "y/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "y"}\n{"file_name": "gone.png", "text": "z"}\n{"file_name": "../../etc.png"}\n'
    )
    source = open_source(tmp_path)
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["x/a.png", "y/../../etc.png", "y/a.png", "y/gone.png"]
    assert source[0].columns == {"text": "x"}
    assert source[2].columns == {"text": "y"}
    with pytest.raises(BadImage, match="leaves the folder"):
        source[1]
    with pytest.raises(BadImage, match="no such file"):
        source[3]


def test_captions_beside_the_images(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a cat \n")
    source = open_source(tmp_path, caption_column="txt")
    assert source.columns == ("caption",)
    assert [source[i].columns["caption"] for i in range(2)] == ["a cat", None]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with refused(UsageError, "nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(WorkError, match="data"):  # and which kinds Pillow reads here, so not golden
        open_source(tmp_path)
    put(tmp_path / "test" / "a.png")
    with refused(UsageError, "data.split"):
        open_source(tmp_path, split="test")
    with refused(UsageError, "caption_column"):
        open_source(tmp_path, caption_column="text")
    (tmp_path / "metadata.csv").write_text("name,text\na.png,x\n")
    with refused(UsageError, "file_name") as error:
        open_source(tmp_path)
    assert "it has name, text" in str(error.value)
    (tmp_path / "metadata.jsonl").write_text("")
    with refused(UsageError, "metadata") as error:
        open_source(tmp_path)
    assert "metadata.csv and metadata.jsonl" in str(error.value)
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(UsageError, match=r"metadata\.jsonl"):
        open_source(tmp_path)


def test_unreadable_files_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = put(tmp_path / "a.png")
    fifo = tmp_path / "f.png"
    os.mkfifo(fifo)
    with pytest.raises(BadImage, match="not a plain file"):  # and does not hang
        read_bytes(fifo)
    with pytest.raises(BadImage, match="cannot be read"):
        read_bytes(tmp_path)
    real = os.open

    def denied(name: Path, flags: int) -> int:  # the tests may run as root, for whom no mode denies anything
        if name == path:
            raise PermissionError(13, "Permission denied")
        return real(name, flags)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(BadImage, match="permission denied"):
        read_bytes(path)


def test_an_enormous_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.png"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)  # sparse
    with pytest.raises(BadImage, match="expected at most"):
        read_bytes(path)


def test_names_are_packed_and_keep_what_is_not_utf8(tmp_path: Path) -> None:
    names = ["a.png", "ü/漢字.png", "", "b\udcff.png"]
    packed = pickle.loads(pickle.dumps(Names(names)))
    assert list(packed) == names
    assert len(Names([])) == 0
    with pytest.raises(IndexError):
        packed[4]
    with open(bytes(tmp_path) + b"/b\xff.png", "wb") as file:
        file.write(put(tmp_path / "x.png").read_bytes())
    source = open_source(tmp_path)
    assert source.key(0) == "b\\xff.png"  # a key can be written into JSON and parquet
    assert source[0].image == source[1].image
    assert walk(tmp_path, frozenset({".png"})) == ["b\udcff.png", "x.png"]


def test_sources_are_picklable_and_checksums_notice_changes(image_folder: Path) -> None:
    source = open_source(image_folder)
    before = checksum(source)
    assert checksum(pickle.loads(pickle.dumps(source))) == before
    put(image_folder / "img_0003.png", 7)
    assert checksum(source) != before


@pytest.mark.parametrize(
    ("kind", "path", "remedy"),
    [
        ("folder", "a.zip", "kind: zip"),
        ("folder", "a.tar", "kind: webdataset"),
        ("folder", "a.lst", "kind: list"),
        ("folder", "images/*.png", "2 files"),
        ("zip", "images", "kind: folder"),
        ("list", "images", "kind: folder"),
        ("webdataset", "empty", "kind: folder"),
        ("folder", "absent", "nothing there"),
    ],
)
def test_a_path_of_another_kind_is_told_which(
    kind: str, path: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    for name in ("a.zip", "a.tar", "a.lst"):
        (tmp_path / name).write_bytes(b"")
    with refused(UsageError, "data.path") as refusal:
        open_source(path, kind=kind)
    assert remedy in str(refusal.value)


def test_a_list_written_for_another_folder_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 2)
    (tmp_path / "lists").mkdir()
    chosen = tmp_path / "lists" / "chosen.txt"
    chosen.write_text("images/img_0000.png\nimages/img_0001.png\n")
    with refused(UsageError, "relative to the list's folder"):  # a parent of the list's folder has them
        open_source(chosen)
    (tmp_path / "images").rename(tmp_path / "lists" / "images")
    assert len(open_source(chosen)) == 2
    chosen = tmp_path / "chosen.txt"
    chosen.write_text("images/img_0000.png\n")
    monkeypatch.chdir(tmp_path / "lists")
    with refused(UsageError, "relative to the list's folder"):
        open_source(chosen)
