"""A finished store is never a stale one: another picture under an old name is refused, whatever holds the pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checksums import tree
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from image_files import COUNT, KINDS, bmp, pictures, set_back, times, write
from sentences import refused
from store_sources import Album, Stop, Stopping, names
from stores import SETTINGS, encode
from tiny_classes import tiny
from videos import frame, write_video

from ldm_vae import open_images
from ldm_vae.core.errors import UsageError
from ldm_vae.data import stamps
from ldm_vae.data.metadata import columns_digest
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.format.layout import IMAGE_BYTES
from ldm_vae.latent_store.format.shards import to_table
from ldm_vae.latent_store.maintain.merge_split import merge
from ldm_vae.latent_store.write.freshness_cache import Sightings

pytestmark = pytest.mark.usefixtures("settled_files")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that a check reads."""
    from ldm_vae.latent_store.write import freshness

    read: list[int] = []
    checksums = freshness.checksums

    def noted(source: Any, indices: Any, num_workers: int) -> Any:
        read.extend(map(int, indices))
        return checksums(source, indices, num_workers)

    monkeypatch.setattr(freshness, "checksums", noted)
    return read


def run(vae: AutoencoderKL, data: Path, out: Path, **more: Any) -> None:
    write_store(vae, open_source(data), out, **{**SETTINGS, "shard_size": 4, **more})


def stored(out: Path) -> dict[str, str]:
    data = LatentDataset(out)
    return dict(zip(data.column("key"), data.column("image_sha256"), strict=True))


@pytest.mark.parametrize("check", ["doubt", "contents"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_replaced_under_its_name_is_refused(
    kind: str, check: Any, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    """Same name, same size, same mtime to the nanosecond."""
    data = write(kind, tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    run(tiny_vae, data, tmp_path / "s", check=check)
    before, were = tree(tmp_path / "s"), times(tmp_path / "data")
    write(kind, tmp_path / "data", pictures(img_3=bmp(33)))
    set_back(were)
    with refused(UsageError, "OUT"):
        run(tiny_vae, data, tmp_path / "s", check=check)
    assert tree(tmp_path / "s") == before
    run(tiny_vae, data, tmp_path / "s", update=True)
    run(tiny_vae, data, tmp_path / "s", check=check)
    run(tiny_vae, data, tmp_path / "fresh")
    assert stored(tmp_path / "s") == stored(tmp_path / "fresh") and verify(tmp_path / "s") == []


def test_a_film_replaced_under_its_name_is_refused_and_all_its_clips_are_taken_up(tmp_path: Path) -> None:
    """Same name, same size, same mtime: a film has several clips, and one checksum."""
    vae, films, store = tiny("AutoencoderKLWan"), tmp_path / "films", tmp_path / "s"
    size: dict[str, Any] = {"resolution": 16, "batch_size": 2, "shard_size": 4}

    def film(number: int, level: int) -> None:
        pictures = [frame(level + at, (16, 24)) for at in range(10)]
        write_video(films / f"{number}.avi", 10, (16, 24), codec="rawvideo", pix_fmt="bgr24", pictures=pictures)

    films.mkdir()
    for number in range(3):
        film(number, number)
    write_store(vae, open_images(films, vae, frames=5), store, **size)
    before, were, sizes = tree(store), times(films), [path.stat().st_size for path in sorted(films.iterdir())]
    film(1, 7)
    set_back(were)
    assert sizes == [path.stat().st_size for path in sorted(films.iterdir())]
    with refused(UsageError, "OUT"):
        write_store(vae, open_images(films, vae, frames=5), store, **size)
    assert tree(store) == before
    write_store(vae, open_images(films, vae, frames=5), store, **size, update=True)
    write_store(vae, open_images(films, vae, frames=5), tmp_path / "fresh", **size)
    assert stored(store) == stored(tmp_path / "fresh") and verify(store) == []
    assert len(LatentDataset(store)) == 6 and sum(len(shard.removed) for shard in read_manifest(store).shards) == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paths"])
def test_a_copied_folder_with_another_picture_is_refused_and_a_true_copy_is_not(
    kind: str, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    data = write(kind, tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    write(kind, tmp_path / "other", pictures(img_0=bmp(40)))
    set_back({tmp_path / "other" / path.name: mtime for path, mtime in times(tmp_path / "data").items()})
    with refused(UsageError, "OUT"):
        run(tiny_vae, tmp_path / "other" / data.name if data.is_file() else tmp_path / "other", tmp_path / "s")
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    run(tiny_vae, tmp_path / "other" / data.name if data.is_file() else tmp_path / "other", tmp_path / "s")


CAPTIONED = ("csv", "txt", "zip", "tar", "parquet")


def write_captions(kind: str, place: Path, captions: list[str]) -> tuple[Path, str]:
    """Pictures that stay and captions that may not: DATA and its `caption_column`."""
    place.mkdir(parents=True, exist_ok=True)
    content = dict(zip(pictures(), captions, strict=True))
    table = "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in content.items())
    if kind in ("csv", "txt"):
        write("folder", place, pictures())
        texts = {"metadata.csv": table} if kind == "csv" else {f"{n[:-4]}.txt": text for n, text in content.items()}
        for name, text in texts.items():
            if not (place / name).exists() or (place / name).read_text() != text:
                (place / name).write_text(text)
        return place, "text" if kind == "csv" else "txt"
    if kind == "zip":
        return write("zip", place, {**pictures(), "metadata.csv": table.encode()}), "text"
    if kind == "tar":
        texts = {f"{name[:-4]}.txt": text.encode() for name, text in content.items()}
        return write("tar", place, dict(sorted({**pictures(), **texts}.items()))), "txt"
    column = [{"bytes": data, "path": None} for data in pictures().values()]
    pq.write_table(pa.table({"image": column, "text": captions}), place / "all.parquet")
    return place / "all.parquet", "text"


@pytest.mark.parametrize("kind", CAPTIONED)
def test_a_caption_that_was_changed_is_refused_and_taken_up(
    kind: str, tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int]
) -> None:
    def encode_captions(captions: list[str], **how: Any) -> list[str]:
        data, column = write_captions(kind, tmp_path / "data", captions)
        source = open_source(data, caption_column=column)
        write_store(tiny_vae, source, tmp_path / "s", **{**SETTINGS, "shard_size": 4, **how})
        rows = LatentDataset(tmp_path / "s")
        named = dict(zip(rows.column("key"), rows.column("caption"), strict=True))
        return [named[key] for key in sorted(named)]

    first = [f"a red {number}" for number in range(COUNT)]
    assert encode_captions(first) == first
    second = [*first[:3], '"a blue 3", in quotes' if kind in ("txt", "tar", "parquet") else "a blue 3", *first[4:]]
    reads.clear()
    with refused(UsageError, "caption"):
        encode_captions(second)
    assert reads == ([3] if kind in ("csv", "txt") else list(range(COUNT)))  # a file of its own, or one of all images
    assert encode_captions(second, update=True) == second
    for _ in range(2):
        assert encode_captions(second) == second  # and is done
    assert not verify(tmp_path / "s")


def test_a_new_class_renumbers_the_labels_of_all(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    for number, name in enumerate(["birds", "cats"]):
        write("folder", tmp_path / "data" / name, {f"{number}.bmp": bmp(number)})
    run(tiny_vae, tmp_path / "data", tmp_path / "s")
    write("folder", tmp_path / "data" / "ants", {"2.bmp": bmp(2)})
    run(tiny_vae, tmp_path / "data", tmp_path / "s", update=True)
    rows = LatentDataset(tmp_path / "s")
    labels = dict(zip(rows.column("label_name"), rows.column("label"), strict=True))
    assert labels == {"ants": 0, "birds": 1, "cats": 2}


def test_captions_of_another_column_are_not_those_that_were_stored(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    data, column = write_captions("csv", tmp_path / "data", ["a"] * COUNT)
    write_store(tiny_vae, open_source(data), tmp_path / "s", **SETTINGS)
    with refused(UsageError, "caption"):
        write_store(tiny_vae, open_source(data, caption_column=column), tmp_path / "s", **SETTINGS)


scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec="utf-8"))),
    *(st.just('"in quotes"'), st.just("[1, 2]"), st.just(np.float32(0.1)), st.just(np.arange(3))),
)
values = scalars | st.lists(st.integers(-5, 5)) | st.dictionaries(st.sampled_from("ab"), st.integers(), min_size=1)


@given(st.lists(st.fixed_dictionaries({"caption": values, "label": values}), min_size=1, max_size=4))
def test_a_table_does_not_change_what_columns_say(rows: list[dict[str, Any]]) -> None:
    stored = to_table([{"key": str(number), **row} for number, row in enumerate(rows)]).to_pylist()
    theirs = [{name: value for name, value in row.items() if name != "key"} for row in stored]
    assert [columns_digest(row) for row in theirs] == [columns_digest(row) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_is_not_read_again_and_what_was_touched_is(
    kind: str, tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int]
) -> None:
    data = write(kind, tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    everything = list(range(COUNT))
    for again in ([], []):  # seen while it was encoded
        run(tiny_vae, data, tmp_path / "s")
        assert reads == (everything if kind == "paths" else again)  # of files behind a table nothing is known
        reads.clear()
    whole = kind in ("zip", "tar", "parquet", "paths")
    os.utime(data if whole else tmp_path / "data" / "img_2.bmp", ns=(10**18, 10**18))
    for again in ([2], []):
        run(tiny_vae, data, tmp_path / "s")
        assert reads == (everything if kind == "paths" or (whole and again) else again)
        reads.clear()
    run(tiny_vae, data, tmp_path / "s", check="contents")
    assert reads == everything
    shutil.rmtree(Sightings(tmp_path / "s").folder, ignore_errors=True)
    reads.clear()
    run(tiny_vae, data, tmp_path / "s")
    assert reads == everything
    reads.clear()
    run(tiny_vae, data, tmp_path / "s", update=True)
    run(tiny_vae, data, tmp_path / "s")
    assert reads == (everything if kind == "paths" else [])


@pytest.mark.parametrize("kind", ["folder", "list", "zip", "tar"])
def test_another_size_is_refused_without_reading_anything(
    kind: str, tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int]
) -> None:
    data = write(kind, tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    assert set(LatentDataset(tmp_path / "s").column(IMAGE_BYTES)) == {len(bmp(0))}
    write(kind, tmp_path / "data", pictures(img_1=bmp(1, side=24)))
    with refused(UsageError, "img_1"):
        run(tiny_vae, data, tmp_path / "s")
    assert reads == []


def test_equal_sizes_are_trusted_only_when_asked_and_then_it_is_said(
    tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    data = write("folder", tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    shutil.rmtree(Sightings(tmp_path / "s").folder)
    run(tiny_vae, data, tmp_path / "s", check="size")
    assert reads == [] and "6 images were not read" in caplog.text
    write("folder", tmp_path / "data", pictures(img_1=bmp(1, side=24)))
    with refused(UsageError, "img_1"):
        run(tiny_vae, data, tmp_path / "s", check="size")


def test_a_file_of_a_moment_ago_is_read_again(
    tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been replaced within one tick of the file system's clock."""
    monkeypatch.setattr(stamps, "SETTLED", 3600 * 10**9)
    data = write("folder", tmp_path / "data", pictures())
    for _ in range(3):
        run(tiny_vae, data, tmp_path / "s")
    assert reads == [*range(COUNT)] * 2 and not Sightings(tmp_path / "s").folder.exists()


def test_a_read_only_file_system_without_a_clock_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """squashfs and ISO 9660 have the times that their maker chose, whole seconds."""
    path = tmp_path / "a"
    path.write_bytes(b"a")
    found, system = os.stat(path), os.statvfs(path)
    whole = os.stat_result(found[:10], {"st_mtime_ns": 10**9, "st_ctime_ns": 10**9})
    assert (whole.st_ctime_ns, whole.st_mode) == (10**9, found.st_mode)
    monkeypatch.setattr(os, "stat", lambda *_: whole)
    assert stamps.file_facts(path) is not None
    flags = os.statvfs_result((*system[:8], os.ST_RDONLY, *system[9:]))
    monkeypatch.setattr(os, "statvfs", lambda *_: flags)
    assert stamps.file_facts(path) is None


def test_the_side_file_is_no_part_of_the_store_and_a_torn_one_does_no_harm(
    tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int]
) -> None:
    data = write("folder", tmp_path / "data", pictures())
    for out in (tmp_path / "s", tmp_path / "t"):
        run(tiny_vae, data, out)
    assert tree(tmp_path / "s") == tree(tmp_path / "t")
    (file,) = Sightings(tmp_path / "s").folder.iterdir()
    file.write_bytes(file.read_bytes()[:20])  # two and a half
    before = tree(tmp_path / "s")
    run(tiny_vae, data, tmp_path / "s")
    assert len(reads) == COUNT - 2 and tree(tmp_path / "s") == before


def test_sightings_of_another_store_under_the_name_do_not_vouch_for_it(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    data = write("folder", tmp_path / "data", pictures(img_4=bmp(44)))
    run(tiny_vae, data, tmp_path / "old")
    write("folder", tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    shutil.copytree(tmp_path / "old", tmp_path / "s")
    with refused(UsageError, "img_4"):
        run(tiny_vae, data, tmp_path / "s")


# --- stopped, updated, repaired ---------------------------------------------------------------------------------------


def test_the_units_of_a_stopped_encode_are_checked(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        encode(tiny_vae, Stopping(after=13), tmp_path / "s")
    changed = {"content": {2: 50}}
    with refused(UsageError, "img_002"):
        encode(tiny_vae, Album(**changed), tmp_path / "s")
    encode(tiny_vae, Album(content={15: 60}), tmp_path / "s")  # not encoded yet
    encode(tiny_vae, Album(content={15: 60}), tmp_path / "s")
    with refused(UsageError, "img_015"):
        encode(tiny_vae, Album(), tmp_path / "s")


@pytest.mark.parametrize("number", [3, 22])
def test_an_update_that_was_stopped_does_not_go_on_with_older_pictures(
    number: int, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    """One of a row that it keeps, one of a unit that it has done."""
    many = {"numbers": tuple(range(45))}
    encode(tiny_vae, Album(), tmp_path / "s")
    with pytest.raises(Stop):
        encode(tiny_vae, Stopping(**many, after=45 + 13), tmp_path / "s", update=True)
    assert len(list((tmp_path / "s" / "units").iterdir())) > 3
    now = Album(**many, content={number: 90})
    with refused(UsageError, f"img_{number:03d}"):
        encode(tiny_vae, now, tmp_path / "s")
    encode(tiny_vae, now, tmp_path / "s", update=True)
    encode(tiny_vae, now, tmp_path / "fresh")
    assert stored(tmp_path / "s") == stored(tmp_path / "fresh")
    encode(tiny_vae, now, tmp_path / "s")


def test_a_picture_that_could_not_be_used_and_now_can_is_not_passed_over(
    tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    for what in ({"bad": (4,)}, {"broken": (4,)}):
        out = tmp_path / next(iter(what))
        encode(tiny_vae, Album(**what), out)
        encode(tiny_vae, Album(**what), out)
        with refused(UsageError, "img_004"):
            encode(tiny_vae, Album(), out)
        encode(tiny_vae, Album(), out, update=True)
        encode(tiny_vae, Album(), out)
        assert stored(out).keys() == names(range(20))


def test_several_resolutions_and_views(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    data = write("folder", tmp_path / "data", pictures())
    more = {"resolution": (16, 8), "views": "flip"}
    run(tiny_vae, data, tmp_path / "s", **more)
    run(tiny_vae, data, tmp_path / "s", **more)
    write("folder", tmp_path / "data", pictures(img_5=bmp(55)))
    with refused(UsageError, "img_5"):
        run(tiny_vae, data, tmp_path / "s", **more)


# --- older stores -----------------------------------------------------------------------------------------------------


@dataclass
class Sized(Album):
    """A source with a column of the name that a store's own has."""

    columns: tuple[str, ...] = ("caption", IMAGE_BYTES)
    content: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Any:
        record = super().__getitem__(index)
        record.columns[IMAGE_BYTES] = 7
        return record


@pytest.fixture
def without_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The writer as it was before rows had sizes."""
    from ldm_vae.latent_store.write import sample_stream

    rows = sample_stream._rows

    def older(sample: Any, *rest: Any) -> Any:
        ready = rows(sample, *rest)
        for one in ready:
            del one.row[IMAGE_BYTES]
            if f"source_{IMAGE_BYTES}" in one.row:
                one.row[IMAGE_BYTES] = one.row.pop(f"source_{IMAGE_BYTES}")
        return ready

    with monkeypatch.context() as patch:
        patch.setattr(sample_stream, "_rows", older)
        yield patch


def test_a_store_without_sizes_is_read_once(
    without_sizes: pytest.MonkeyPatch, tiny_vae: AutoencoderKL, tmp_path: Path, reads: list[int]
) -> None:
    data = write("folder", tmp_path / "data", pictures())
    run(tiny_vae, data, tmp_path / "s")
    without_sizes.undo()
    assert IMAGE_BYTES not in read_manifest(tmp_path / "s").columns
    shutil.rmtree(Sightings(tmp_path / "s").folder)
    for again in (list(range(COUNT)), []):
        run(tiny_vae, data, tmp_path / "s")
        assert reads == again
        reads.clear()
    write("folder", tmp_path / "data", pictures(img_1=bmp(1, side=24)))
    with refused(UsageError, "img_1"):
        run(tiny_vae, data, tmp_path / "s")
    run(tiny_vae, data, tmp_path / "s", update=True)
    run(tiny_vae, data, tmp_path / "s")
    assert read_manifest(tmp_path / "s").columns[IMAGE_BYTES] == "int64"


def test_stores_with_and_without_sizes_are_merged(
    without_sizes: pytest.MonkeyPatch, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    encode(tiny_vae, Album(numbers=tuple(range(8))), tmp_path / "old")
    without_sizes.undo()
    encode(tiny_vae, Album(numbers=tuple(range(8, 16))), tmp_path / "new")
    for parts in (("old", "new"), ("new", "old")):
        out = tmp_path / "_".join(parts)
        merge([tmp_path / part for part in parts], out)
        sizes = dict(zip(LatentDataset(out).column("key"), LatentDataset(out).column(IMAGE_BYTES), strict=True))
        assert [sizes[f"img_{n:03d}"] for n in range(16)] == [None] * 8 + [24 * 20 * 3] * 8
        in_order = sorted(sizes, key=lambda key: key in names(range(8)) and parts[0] == "new")
        source = Album(numbers=tuple(int(key[-3:]) for key in in_order))
        encode(tiny_vae, source, out)
        with refused(UsageError, "OUT"):
            encode(tiny_vae, Album(numbers=source.numbers, content={3: 30}), out)


def test_a_column_of_the_source_is_not_taken_for_sizes(
    without_sizes: pytest.MonkeyPatch, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    encode(tiny_vae, Sized(), tmp_path / "old")
    without_sizes.undo()
    assert LatentDataset(tmp_path / "old").column(IMAGE_BYTES) == [7] * 20
    encode(tiny_vae, Sized(), tmp_path / "old")
    encode(tiny_vae, Sized(content={3: 30}), tmp_path / "old", update=True)
    encode(tiny_vae, Sized(content={3: 30}), tmp_path / "old")
    encode(tiny_vae, Sized(), tmp_path / "new")
    assert LatentDataset(tmp_path / "new").column(f"source_{IMAGE_BYTES}") == [7] * 20
    assert LatentDataset(tmp_path / "new").column(IMAGE_BYTES) == [24 * 20 * 3] * 20
