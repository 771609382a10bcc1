"""A split of one source by key, without copies across it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import KINDS, bmp, photograph, write
from PIL import Image
from sentences import refused
from splits import NOTHING, keys, split
from store_sources import Album, Pictures

from ldm_vae.core.errors import UsageError
from ldm_vae.data import copies
from ldm_vae.data.holdout import is_held_out, numbers_of, parts_of, record_of
from ldm_vae.data.source import Source, open_source
from ldm_vae.data.stamps import key_numbers
from ldm_vae.data.survey import lines, survey

# --- the law ----------------------------------------------------------------------------------------------------------


def test_a_key_alone_decides() -> None:
    train, held = split(Album(numbers=tuple(range(400))), 0.25)
    assert len(train) + len(held) == 400 and not {*train} & {*held} and 70 < len(held) < 130
    assert split(Album(numbers=tuple(range(399, -1, -1))), 0.25) == (train[::-1], held[::-1])
    grown = split(Album(numbers=tuple(range(800))), 0.25)
    assert {*train} <= {*grown[0]} and {*held} <= {*grown[1]}
    assert {*held} < {*split(Album(numbers=tuple(range(400))), 0.5)[1]}
    # written down: another hash would move every user's images
    assert split(Album(numbers=tuple(range(30))), 0.1)[1] == ["img_000", "img_019"]


def sources(tmp_path: Path) -> dict[str, Source]:
    content = {f"img_{number}.bmp": bmp(number) for number in range(24)}
    found: dict[str, Source] = {kind: open_source(write(kind, tmp_path / kind, content)) for kind in KINDS}
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [np.full((4, 4), number).tolist() for number in range(24)]
    pq.write_table(pa.table({"scan": arrays}), tmp_path / "scans.parquet")
    given = {"image_column": "scan", "channels": 1, "value_range": (0, 255)}
    return found | {"array": open_source(tmp_path / "scans.parquet", **given), "own": Pictures(24)}


@pytest.mark.parametrize("kind", [*KINDS, "array", "own"])
def test_parts_of_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path)[kind]
    numbers = numbers_of(source)
    both = parts_of(source, numbers, record_of(numbers, 0.4, NOTHING))
    seen = {}
    for part in both:
        again = pickle.loads(pickle.dumps(part)) if kind != "own" else part
        assert (again.columns, again.decoding) == (source.columns, source.decoding) and len(again) > 2
        seen |= {again.key(index): again[index] for index in range(len(again))}
    assert sorted(seen) == sorted(keys(source))
    for index in range(len(source)):
        record, expected = seen[source.key(index)], source[index]
        assert record.key == expected.key and np.array_equal(np.asarray(record.image), np.asarray(expected.image))
    whole = {int(number): at for at, number in enumerate(key_numbers(source))}
    for part in both:
        for index, number in enumerate(key_numbers(part)):
            expected = source.facts(whole[int(number)]) if hasattr(source, "facts") else None
            assert part.facts(index) == expected


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_a_part_without_an_image_is_refused(share: float) -> None:
    with refused(UsageError, "data.holdout"):
        is_held_out(numbers_of(Album()), share)


def test_all_that_would_train_are_copies() -> None:
    numbers = numbers_of(Album())
    with refused(UsageError, "data.holdout_copies"):
        parts_of(Album(), numbers, record_of(numbers, 0.5, numbers))


def test_a_stream_has_no_keys_beforehand() -> None:
    class Ordered(Album):
        shuffle_buffer = 0

        def __iter__(self) -> Any:
            return iter(())

    with refused(UsageError, "data.holdout"):
        numbers_of(Ordered())


# --- copies -----------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str, **options: Any) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def frequencies(picture: Image.Image) -> torch.Tensor:
    return copies.frequencies(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))


def pairs(ours: list[Image.Image], theirs: list[Image.Image]) -> set[tuple[int, int]]:
    found = copies.matches(torch.stack([*map(frequencies, ours)]), torch.stack([*map(frequencies, theirs)]))
    return {(first + row, column) for first, same in found for row, column in same.nonzero().tolist()}


def test_copies_are_found_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [photograph(number) for number in range(12)]
    itself = {(number, number) for number in range(12)}
    assert pairs(pictures, pictures) == itself
    monkeypatch.setattr(copies, "AT_ONCE", 24)  # two rows of a block
    for side in (32, 64, 100, 400):
        assert pairs([one.resize((side, side), Image.Resampling.LANCZOS) for one in pictures], pictures) == itself, side
    for kind, quality in (("JPEG", 95), ("JPEG", 50), ("JPEG", 30), ("WEBP", 60)):
        assert pairs([encoded(one, kind, quality=quality) for one in pictures], pictures) == itself, (kind, quality)


def test_what_a_hash_alone_would_take_for_copies() -> None:
    from sklearn.datasets import load_digits

    digits = [Image.fromarray((image * 15.9).astype(np.uint8)) for image in load_digits().images[:400]]
    assert pairs(digits, digits) == {(number, number) for number in range(400)}
    flat = [Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 90, 255)]
    assert pairs(flat, flat) == {(0, 0), (1, 1), (2, 2)}
    # nor would grey levels do alone: faint pictures are all near one another
    faint = [photograph(number, 64).point(lambda value: 128 + value // 32) for number in range(6)]
    assert pairs(faint, faint) == {(number, number) for number in range(6)}


def test_the_transform_is_the_dct() -> None:
    from scipy.fft import dctn

    image = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    expected = dctn(image[0].double().numpy(), norm="ortho")[:8, :8].ravel() / 32
    assert np.allclose(copies.frequencies(image).numpy(), expected, atol=0.05, rtol=1e-3)


def test_an_image_that_cannot_be_read_is_like_nothing() -> None:
    looks = copies.look(Pictures(6, bad=(2,), broken=(4,)), range(6), 0)
    assert [bool(row.isnan().any()) for row in looks] == [False, False, True, False, True, False]
    ((_, same),) = copies.matches(looks, looks)
    assert same.diagonal().tolist() == [True, True, False, True, False, True]


def test_inspect_says_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        photograph(number, 64).save(tmp_path / f"{number}.png")
    photograph(1, 64).resize((40, 40)).save(tmp_path / "5.jpg")
    photograph(1, 64).save(tmp_path / "6.png")

    def said() -> str:
        return next(line for line in lines(survey(open_source(tmp_path)), 64, [(64, 64)]) if line.startswith("copies"))

    assert said() == "copies      2 images look like an earlier one: 5.jpg like 1.png"
    monkeypatch.setattr(copies, "AT_ONCE", 6)  # an image at a time
    assert said() == "copies      2 images look like an earlier one: 5.jpg like 1.png"
    monkeypatch.setattr("ldm_vae.data.survey.MOST_COMPARED", 5)
    assert said() == "copies      not looked for among more than 5 images"
