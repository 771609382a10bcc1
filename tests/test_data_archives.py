"""Zips, list files, tar shards: keys, columns, damage, names that climb out, shards that can only be read in order."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentences import refused

from ldm_vae.core import files
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import tars
from ldm_vae.data.dataset import ordered_loader, training_loader
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.source import kind_of, open_source
from ldm_vae.data.stream import Stream, length
from ldm_vae.data.transforms import TransformConfig


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_images_beside_shards_are_a_question(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    for name in ("backup.tar", "table.parquet"):
        (tmp_path / name).write_bytes(b"")
        with refused(UsageError, "--kind"):
            kind_of(str(tmp_path))
        (tmp_path / name).unlink()
    assert len(open_source(tmp_path, kind="folder")) == 1


# --- zip --------------------------------------------------------------------------------------------------------------


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path: Path, method: int) -> None:
    members = {
        "dog/b.png": png(2),
        "cat/a.png": png(1),
        "cat/a.txt": b"a cat",
        "__MACOSX/cat/._a.png": b"",
        ".hidden.png": b"",
        "folder/": b"",
    }
    source = open_source(write_zip(tmp_path / "x.zip", members, method), caption_column="txt")
    assert [source.key(i) for i in range(len(source))] == ["cat/a.png", "dog/b.png"]
    again = pickle.loads(pickle.dumps(source))
    assert again[0].image == png(1)
    assert again[0].columns == {"label": 0, "label_name": "cat", "caption": "a cat"}
    assert again[1].columns == {"label": 1, "label_name": "dog", "caption": None}


def test_zip_with_a_table(tmp_path: Path) -> None:
    table = b"file_name,text\nb.png,bee\nmissing.png,none\n"
    source = open_source(write_zip(tmp_path / "x.zip", {"in/b.png": png(2), "in/metadata.csv": table}))
    assert source[0].columns == {"text": "bee"}
    assert source.key(1) == "in/missing.png"
    with pytest.raises(BadImage, match="no such member"):
        source[1]


def test_damaged_zips(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": png(1), "../../b.png": png(2), "c.png": png(3, 64)})
    source = open_source(path)
    by_key = {source.key(index): index for index in range(3)}
    with pytest.raises(BadImage, match="climbs out"):
        source[by_key["../../b.png"]]
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    data[offsets["c.png"] + 60] ^= 0xFF
    data[offsets["a.png"]] = 0
    path.write_bytes(data)
    with pytest.raises(BadImage, match="damaged in the archive"):
        source[by_key["c.png"]]
    with pytest.raises(BadImage, match="archive is damaged here"):
        source[by_key["a.png"]]
    path.write_bytes(data[: offsets["c.png"] + 40])
    with pytest.raises(BadImage, match="cut off"):
        source[by_key["c.png"]]
    with pytest.raises(UsageError, match=r"x\.zip"):
        open_source(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": b"\0" * 10_000_000, "b.png": png(1)})
    source = open_source(path)
    source._fields[0, 2] = 100  # the directory lies: a hundred bytes, and ten million come out
    with pytest.raises(BadImage, match="checksum is wrong"):
        source[0]
    source._fields[0, 2] = 2**40
    with pytest.raises(BadImage, match="limit is 1"):
        source[0]
    source._fields[0, 4] |= 1
    with pytest.raises(BadImage, match="encrypted"):
        source[0]


# --- list -------------------------------------------------------------------------------------------------------------


def test_list(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    listed = tmp_path / "chosen.txt"
    listed.write_text(f"# chosen\nsub/b.png\n\n{tmp_path / 'a.png'}\ngone.png\n")
    source = open_source(listed)
    assert [source.key(i) for i in range(3)] == ["sub/b.png", str(tmp_path / "a.png"), "gone.png"]
    assert source[1].image == png(1)
    with pytest.raises(BadImage, match="no such file"):
        source[2]
    listed.write_text("a.png\nb.png\na.png\n")
    with refused(UsageError, "chosen.txt") as error:
        open_source(listed)
    assert "line 3 repeats line 1" in str(error.value)
    listed.write_text("# nothing\n")
    with refused(WorkError, "chosen.txt"):
        open_source(listed)
    listed.write_bytes(png(1))
    with refused(UsageError, "chosen.txt"):
        open_source(listed)


# --- tar --------------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: list[tuple[str, bytes]], compress: str = "") -> Path:
    with tarfile.open(path, f"w:{compress}") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, last: int) -> list[tuple[str, bytes]]:
    out: list[tuple[str, bytes]] = []
    for index in range(first, last):
        out += [
            (f"./{index:04d}.png", png(index)),
            (f"./{index:04d}.txt", f"picture {index}".encode()),
            (f"./{index:04d}.cls", b"7"),
            (f"./{index:04d}.json", json.dumps({"tags": {"en": f"tag {index}"}}).encode()),
        ]
    return out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write_tar(tmp_path / "shards" / f"{number:03d}.tar", samples(4 * number, 4 * number + 4))
    return tmp_path / "shards"


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{000..002}.tar", "/00{0,1,2}.tar"])
def test_tar_shards(shards: Path, pattern: str) -> None:
    assert kind_of(f"{shards}{pattern}") == "webdataset"
    source = open_source(f"{shards}{pattern}", caption_column="txt")
    assert length(source) == 12
    assert source.columns == ("caption", "cls", "json")
    again = pickle.loads(pickle.dumps(source))
    assert again.key(5) == "001/0005"
    assert again[5].image == png(5)
    assert again[5].columns == {"caption": "picture 5", "cls": 7, "json": '{"tags": {"en": "tag 5"}}'}


def test_a_caption_in_the_json(shards: Path) -> None:
    source = open_source(shards, caption_column="json.tags.en")
    assert source[2].columns["caption"] == "tag 2"
    assert source[2].columns["txt"] == "picture 2"
    with refused(UsageError, "data.caption_column") as error:
        open_source(shards, caption_column="text")
    assert "txt, cls, json" in str(error.value)


def test_several_images_in_a_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"first"), ("1.mask.png", b"mask"), ("1.txt", b"x")])
    with refused(UsageError, "image_column"):
        open_source(tmp_path / "a.tar")
    assert open_source(tmp_path / "a.tar", image_column="jpg")[0].image == b"first"
    assert open_source(tmp_path / "a.tar", image_column="mask.png")[0].image == b"mask"
    assert open_source(tmp_path / "a.tar", image_column="jpg").columns == ("txt",)


def test_bad_members_are_bad_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("../out.png", None), ("/abs.png", None), ("link.png", tarfile.SYMTYPE), ("text.txt", None)):
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = kind, "/etc/passwd"
            else:
                info.size = len(png(1))
            archive.addfile(info, None if kind else io.BytesIO(png(1)))
        good = tarfile.TarInfo("good.png")
        good.size = len(png(1))
        archive.addfile(good, io.BytesIO(png(1)))
    source = open_source(path)
    reasons = []
    for index in range(4):
        with pytest.raises(BadImage) as caught:
            source[index]
        reasons.append(caught.value.reason)
    assert "climbs out" in reasons[0] and "climbs out" in reasons[1]
    assert "link" in reasons[2] and "only txt" in reasons[3]
    assert source[4].image == png(1)


def test_a_shard_that_is_cut_off(shards: Path) -> None:
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[: len(whole) // 2 + 700])
    (shards / "002.tar").write_bytes(b"no tar at all" * 100)
    source = open_source(shards)
    keys = [source.key(index) for index in range(len(source))]
    assert keys[:4] == ["000/0000", "000/0001", "000/0002", "000/0003"]
    assert "001/rest-of-shard" in keys or source.key(len(source) - 2).startswith("001/")
    assert keys[-1] == "002/rest-of-shard"
    good, bad = 0, []
    for done, broken in ordered_loader(source, 8, batch_size=4):
        good += len(done)
        bad += broken
    assert good >= 5
    assert {entry.key.split("/")[0] for entry in bad} == {"001", "002"}
    assert any("rest of the shard" in entry.reason for entry in bad)


def test_patterns() -> None:
    assert tars.expand("http://x/{08..11}.tar") == [f"http://x/{n}.tar" for n in ("08", "09", "10", "11")]
    assert tars.expand("/nowhere/*.tar") == []
    with refused(UsageError, "/nowhere/*.tar"):
        open_source("/nowhere/*.tar")
    with refused(UsageError, "/nowhere/0.tar"):
        open_source("/nowhere/{0..2}.tar")
    with refused(UsageError, "pipe:cat x.tar"):
        open_source("pipe:cat x.tar", kind="webdataset")


# --- in order ---------------------------------------------------------------------------------------------------------


def stream_of(shards: Path) -> Stream:
    for path in sorted(shards.glob("*.tar")):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    source = open_source(f"{shards}/*.tar.gz", caption_column="txt", shuffle_buffer=5)
    assert isinstance(source, Stream)
    return source


def test_a_stream_says_what_it_cannot_do(shards: Path) -> None:
    stream = stream_of(shards)
    assert length(stream) is None
    assert len(list(stream)) == 12
    for asked in (lambda: len(stream), lambda: stream[3], lambda: stream.key(3)):
        with refused(UsageError, "data"):
            asked()
    with refused(UsageError, "data"):
        next(iter(ordered_loader(stream, 8, [1], batch_size=2)))


def test_a_stream_in_order(shards: Path) -> None:
    stream = stream_of(shards)
    for num_workers in (0, 1):
        batches = list(ordered_loader(stream, 8, batch_size=5, num_workers=num_workers))
        assert [sample.key for good, _ in batches for sample in good] == [f"{i // 4:03d}/{i:04d}" for i in range(12)]
        assert batches[0][0][1].columns["caption"] == "picture 1"
        assert [int(sample.crop.pixels[0, 0, 0]) for good, _ in batches for sample in good] == list(range(12))


def test_training_from_a_stream_is_the_same_for_any_layout_and_resume(shards: Path) -> None:
    stream = stream_of(shards)

    def read(images: int, batch_size: int, world_size: int, start: int = 0, num_workers: int = 0) -> dict[int, str]:
        seen = {}
        for rank in range(world_size):
            loader = training_loader(
                stream, TransformConfig(), 8, seed=1, batch_size=batch_size, rank=rank,
                world_size=world_size, start_position=start, num_workers=num_workers,
            )  # fmt: skip
            for batch in islice(loader, images // batch_size // world_size):
                seen |= dict(zip(batch.positions.tolist(), batch.keys, strict=True))
        return dict(sorted(seen.items()))

    expected = read(24, 24, 1)
    assert len(set(list(expected.values())[:12])) == 12  # each once in an epoch
    assert list(expected.values())[:12] != sorted(expected.values())[::2]  # and shuffled
    assert list(expected.values())[:12] != list(expected.values())[12:]
    assert read(24, 2, 3) == expected
    assert read(24, 4, 2, num_workers=1) == expected
    assert read(8, 4, 2) | read(16, 8, 2, start=8) == expected


def test_bad_images_of_a_stream(shards: Path) -> None:
    members = [("a.png", b"junk"), ("b.png", png(1)), ("c.txt", b"alone")]
    write_tar(shards / "000.tar", members)
    for number in (1, 2):
        (shards / f"00{number}.tar").unlink()
    stream = stream_of(shards)
    loader = training_loader(stream, TransformConfig(), 8, seed=0, batch_size=1)
    bad: dict[str, str] = {}
    for batch in islice(loader, 4):
        assert batch.keys == ["000/b"]
        bad |= {entry.key: entry.reason for entry in batch.bad}
    assert bad.keys() == {"000/a", "000/c"}
    ((good, broken),) = ordered_loader(stream, 8, batch_size=4)
    assert [sample.key for sample in good] == ["000/b"]
    assert [entry.key for entry in broken] == ["000/a", "000/c"]


def test_a_stream_without_images_ends(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        path.write_bytes(b"nothing")
    with refused(WorkError, "stream") as error:
        next(training_loader(stream_of(shards), TransformConfig(), 8, seed=0, batch_size=2))
    assert "000/" in str(error.value)


def test_shards_behind_a_url(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{{000..003}}.tar"  # the fourth does not exist
        stream = open_source(url)
        assert isinstance(stream, Stream)
        items = list(stream)
        # a minute for each piece, and too little in it
        clock = itertools.count(step=files.WINDOW)
        monkeypatch.setattr("ldm_vae.data.sources.webdataset.clock", lambda: next(clock))
        monkeypatch.setattr(files, "LEAST", 2**30)
        stalled = list(stream)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [item.key for item in items[:12]] == [f"{i // 4:03d}/{i:04d}" for i in range(12)]
    assert isinstance(items[12], Bad) and items[12].key == "003/rest-of-shard"
    assert len(items) == 13
    assert [item.key for item in stalled] == [f"{i:03d}/rest-of-shard" for i in range(4)]
