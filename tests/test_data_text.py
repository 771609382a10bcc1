"""Text stays the text that it is: captions, tables, lists, tar members, JSONL."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from images import write_images
from sentences import refused

from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import decode, lines
from ldm_vae.data import tars
from ldm_vae.data.quarantine import Bad, BadImage, Quarantine, read_quarantine
from ldm_vae.data.source import open_source
from ldm_vae.data.sources.webdataset import shard_names

TEXTS = ("a café", "007", "true", "2020-01-02", "NA", "null", "1.50", "1e3", "0x10", "日本\u2028語\u0085.")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_by_their_mark(encoding: str, tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (image,) = tmp_path.iterdir()
    image.with_suffix(".txt").write_text("a café\n", encoding=encoding)
    assert open_source(tmp_path, caption_column="txt")[0].columns["caption"] == "a café"
    assert decode("a café".encode(encoding)) == "a café"
    assert tars.column_value("txt", "a café".encode(encoding)) == "a café"


@pytest.mark.parametrize("data", ["a café".encode("latin-1"), "a cat".encode("utf-16-le"), b"\xef\xbb\xbf\xff"])
def test_a_caption_that_is_no_text_is_a_reason(data: bytes, tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (image,) = tmp_path.iterdir()
    image.with_suffix(".txt").write_bytes(data)
    with pytest.raises(BadImage, match=r"caption .*\.txt: expected UTF-8"):
        open_source(tmp_path, caption_column="txt")[0]


def table(form: str, rows: list[dict[str, Any]], folder: Path) -> None:
    path = folder / f"metadata.{form}"
    if form == "csv":
        text = "".join(",".join('"' + str(value) + '"' for value in row.values()) + "\n" for row in rows)
        path.write_text(",".join(rows[0]) + "\n" + text, encoding="utf-8")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["caption", "tag"])
@pytest.mark.parametrize("text", [*TEXTS, "two\nlines"])
def test_a_column_of_text_stays_text(form: str, column: str, text: str, tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    (image,) = tmp_path.iterdir()
    table(form, [{"file_name": image.name, column: text}], tmp_path)
    assert open_source(tmp_path)[0].columns[column] == text


def test_numbers_of_a_csv_are_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    first, second = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "metadata.csv").write_text(f"file_name,label,score,caption\n{first},3,0.5,12\n{second},-4,,7\n")
    source = open_source(tmp_path)
    assert [source[index].columns for index in range(2)] == [
        {"label": 3, "score": 0.5, "caption": "12"},
        {"label": -4, "score": None, "caption": "7"},
    ]


def test_a_name_twice_in_a_table_is_said_and_two_types_are_a_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("a", "b"):
        write_images(tmp_path / folder, 1)
    name = next((tmp_path / "a").iterdir()).name
    (tmp_path / "a" / "metadata.csv").write_text(f"file_name,note\n{name},one\n{name},two\n")
    assert open_source(tmp_path)[0].columns == {"note": "two"}
    assert f"a/{name} 2 times" in caplog.text
    (tmp_path / "b" / "metadata.csv").write_text(f"file_name,note\n{name},5\n")
    with refused(UsageError, "metadata"):
        open_source(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_with_a_mark(encoding: str, tmp_path: Path) -> None:
    names = ["odd\u0085name.png", "b.png"]
    (tmp_path / "l.txt").write_text("\n".join(names) + "\r\n", encoding=encoding, newline="")
    source = open_source(tmp_path / "l.txt")
    assert [source.key(index) for index in range(len(source))] == names


def test_lines_are_ended_by_line_feeds_alone(tmp_path: Path) -> None:
    assert lines("") == [] and lines("a\r\n\nb\u2028\u0085c\n") == ["a", "", "b\u2028\u0085c"]
    found = Bad("a\u0085b\u2028.png", "no\u0085image")
    quarantine = Quarantine(5, path=tmp_path / "quarantine.jsonl")
    quarantine.add([found], good=4)
    (tmp_path / "quarantine.jsonl").write_text(json.dumps(found.__dict__, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_quarantine(tmp_path / "quarantine.jsonl") == [found]


def tar(path: Path, names: tuple[str, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"0007"))
    return path


def test_several_pictures_in_a_sample_are_a_question(tmp_path: Path) -> None:
    dated = tar(tmp_path / "dated.tar", ("2024.01.05.jpg", "2024.02.07.jpg"))
    with refused(UsageError, "image_column"):
        open_source(dated)
    both = tar(tmp_path / "both.tar", ("a.jpg", "a.png", "a.id"))
    with refused(UsageError, "image_column"):
        open_source(both)
    assert open_source(both, image_column="png")[0].columns["id"] == "0007"


def test_shards_of_one_name_in_two_folders_have_keys_that_differ(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tar(tmp_path / folder / "00.tar", ("x.jpg",))
    source = open_source(f"{tmp_path}/{{a,b}}/00.tar")
    assert [source.key(index) for index in range(2)] == ["a/00/x", "b/00/x"]
    assert shard_names(["https://h/p/a/0.tar", "https://h/p/b/0.tar"])["https://h/p/b/0.tar"] == "b/0"
    with refused(UsageError, "data"):
        open_source(tar(tmp_path / "again.tar", ("x.jpg", "y.jpg", "x.jpg")))
