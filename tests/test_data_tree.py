"""Trees of files: hidden, system and own folders are left out and said; images of other endings are counted."""

from __future__ import annotations

import io
import os
import subprocess
import unicodedata
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from sentences import refused

from ldm_vae.core.errors import UsageError
from ldm_vae.core.ownership import MARK
from ldm_vae.data import tree
from ldm_vae.data.source import open_source


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_SAID", set())


def picture(ending: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, ending)
    return file.getvalue()


LITTER = (
    ".thumbnails/a.png", "@eaDir/a.jpg/SYNOFILE_THUMB_XL.jpg", "b/#recycle/a.png", "b/$RECYCLE.BIN/x/a.png",
    "__MACOSX/._a.png", "b/._a.png", "Catalog Previews.lrdata/a.jpg", "Photos Library.photoslibrary/originals/a.jpg",
    "System Volume Information/a.png", "lost+found/a.png",
)  # fmt: skip
OURS = (
    f"decoded/{MARK}", "decoded/00000000-a.png", "runs/demo/config.yaml", "runs/demo/metrics.jsonl",
    "runs/demo/samples/images-1.png", "latents/manifest.json", "latents/shards/x.png", "rep/metrics.json",
    "rep/pictures/pictures.json", "rep/pictures/000.original.png", "vae/config.json", "vae/a.png",
    "vae/diffusion_pytorch_model.safetensors", "pipe/model_index.json", "pipe/vae/a.png",
)  # fmt: skip


def lay_out(root: Path, kind: str, names: tuple[str, ...], content: bytes | None = None) -> Path:
    """The files in a folder, or in a zip of it."""
    files = {name: picture() if content is None else content for name in names}
    if kind == "zip":
        with zipfile.ZipFile(root / "data.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return root / "data.zip"
    for name, data in files.items():
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_bytes(data)
    return root / "data"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_litter_and_our_own_output_are_left_out_and_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(lay_out(tmp_path, kind, (*LITTER, *OURS, "b/one.png", "decoy/metrics.json", "decoy/two.png")))
    assert [source.key(index) for index in range(len(source))] == ["b/one.png", "decoy/two.png"]
    said = caplog.text
    for words in ("@eaDir", "2 hidden", "8 folders of a system", "6 folders that ldm-vae"):
        assert words in said


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_of_another_ending_are_counted(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(20)
    lay_out(tmp_path, kind, ("a.heic", "b/c.HEIC", "d.HIF"), heic)
    if kind == "folder":
        lay_out(tmp_path, kind, ("noending", "x.jxl"), b"\xff\x0a" + bytes(20))
        lay_out(tmp_path, kind, ("good.png", "photo"), picture())
        lay_out(tmp_path, kind, ("readme.txt", "notes", "a.xmp"), b"text")
        assert len(open_source(tmp_path / "data")) == 1
        assert "2 of .heic, 1 of .hif, 1 of .jxl, 2 of no ending" in caplog.text
    else:
        with zipfile.ZipFile(tmp_path / "data.zip", "a") as archive:
            archive.writestr("good.png", picture())
        assert len(open_source(tmp_path / "data.zip")) == 1
        assert "2 of .heic, 1 of .hif" in caplog.text


def test_a_folder_of_ours_that_is_named_is_read(tmp_path: Path) -> None:
    data = lay_out(tmp_path, "folder", OURS)
    assert len(open_source(data / "decoded")) == 1
    assert len(open_source(data / "rep" / "pictures")) == 1


def test_no_folder_is_entered_twice_and_links_come_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = lay_out(tmp_path, "folder", ("z/a.png",))
    (data / "first").symlink_to(data / "z")  # by its name it would be first
    (data / "loop").symlink_to(data / "loop")
    # thirty levels of two links to the next: 2^30 ways to one image
    for level in range(30):
        (data / f"level{level}").mkdir()
        for name in ("left", "right"):
            (data / f"level{level}" / name).symlink_to(data / f"level{level + 1}")
    (data / "level30").mkdir()
    (data / "level30" / "b.png").write_bytes(picture())
    source = open_source(data)
    assert [source.key(index) for index in range(len(source))] == ["level30/b.png", "z/a.png"]
    assert "62 links" in caplog.text


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_are_composed_in_folders_zips_and_tables(on_disk: str, tmp_path: Path) -> None:
    name, raw = "Köln/é.png", unicodedata.normalize(on_disk, "Köln/é.png")
    data = lay_out(tmp_path, "folder", (raw, "Koln/other.png"))
    (data / unicodedata.normalize(on_disk, "Köln/é.txt")).write_text("an accent")
    source = open_source(data, caption_column="txt")
    assert [source.key(index) for index in range(2)] == ["Koln/other.png", name]
    assert source[1].image == picture() and source[1].columns["caption"] == "an accent"
    archive = lay_out(tmp_path, "zip", (raw.replace("/", "\\"),))
    assert open_source(archive).key(0) == name
    (data / "metadata.csv").write_text("file_name,text\n" + unicodedata.normalize("NFD", "Köln\\é.png") + ",one\n")
    source = open_source(data)
    assert len(source) == 2 and source[1].columns == {"text": "one"}
    (data / "Köln").mkdir(exist_ok=True)
    other = unicodedata.normalize("NFD" if on_disk == "NFC" else "NFC", "Köln/é.png")
    (data / other).parent.mkdir(exist_ok=True)
    (data / other).write_bytes(picture())
    with refused(UsageError, "data"):
        open_source(data)


def test_members_of_one_name_are_one_or_refused(tmp_path: Path) -> None:
    for name, second in (("same", picture()), ("differ", picture("BMP"))):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("a.png", picture())
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("a.png", second)
    assert len(open_source(tmp_path / "same.zip")) == 1
    with refused(UsageError, "data"):
        open_source(tmp_path / "differ.zip")


def test_utf8_without_its_flag(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "zip", ("Köln.png",))
    content = path.read_bytes()
    info = zipfile.ZipFile(path).infolist()[0]
    assert info.flag_bits & 0x800
    # the flag's high byte in the local header and in the directory
    for signature, at in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        place = content.index(signature) + at
        content = content[:place] + bytes([content[place] & ~0x08]) + content[place + 1 :]
    path.write_bytes(content)
    assert open_source(path).key(0) == "Köln.png"


def test_a_tree_deeper_than_pythons_stack(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=folder)
        folder, above = os.open("d", os.O_RDONLY, dir_fd=folder), folder
        os.close(above)
    os.close(os.open("x.png", os.O_CREAT, dir_fd=folder))
    os.close(folder)
    try:
        assert tree.walk(tmp_path, frozenset({".png"})) == ["d/" * 1200 + "x.png"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil's own descends by recursion
