"""The loader: each sample once per epoch over all ranks, one shape a batch, the same from any workers, exact resume."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from sentences import refused
from store_sources import AFTER, Album, Footage, Mixed, Pictures, ordered_clips
from stores import SETTINGS
from tiny_classes import tiny
from torch.utils.data import DataLoader

from ldm_vae.core.errors import UsageError
from ldm_vae.latent_store import LatentDataset, write_store
from ldm_vae.latent_store.read.loader import LatentLoader, LatentStream
from ldm_vae.latent_store.write import sample_stream


@pytest.fixture
def store(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    write_store(tiny_vae, Pictures(), tmp_path / "s", **SETTINGS, views="flip")
    return tmp_path / "s"


@pytest.fixture
def mixed(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """Eleven pictures in three shapes."""
    write_store(tiny_vae, Mixed(11), tmp_path / "m", **{**SETTINGS, "resolution": 24, "bucket_step": 4})
    return tmp_path / "m"


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eleven clips of three lengths."""
    monkeypatch.setattr(sample_stream, "ordered_loader", ordered_clips)
    write_store(tiny("AutoencoderKLWan"), Footage(11), tmp_path / "c", **SETTINGS)
    return tmp_path / "c"


def indices(batches: Any) -> list[list[int]]:
    return [batch["index"].tolist() if batch else [] for batch in batches]


def test_every_sample_once_per_epoch_over_all_ranks(store: Path) -> None:
    data = LatentDataset(store)
    loaders = [data.loader(2, rank=rank, world_size=3) for rank in range(3)]
    seen: Counter[int] = Counter()
    for epoch in range(6):
        epochs = [indices(loader) for loader in loaders]
        assert len({len(batches) for batches in epochs}) == 1, "ranks have equally many batches"
        assert all(len(batch) == 2 for batches in epochs for batch in batches), "and all of them are full"
        seen.update(index for batches in epochs for batch in batches for index in batch)
        assert loaders[0].epoch == epoch + 1
    assert set(seen) == set(range(21)) and set(seen.values()) == {6}  # 6 epochs of 21 are 21 batches of 6


def test_batches_do_not_depend_on_ranks_workers_or_the_way_they_are_asked_for(store: Path) -> None:
    data = LatentDataset(store, view="random")
    alone = list(data.loader(6))
    for workers in (1, 2):
        for one, other in zip(alone, data.loader(6, num_workers=workers), strict=True):
            assert torch.equal(one["latents"], other["latents"]) and one["caption"] == other["caption"]
    halves = zip(*(data.loader(3, rank=rank, world_size=2) for rank in range(2)), strict=True)
    for whole, parts in zip(alone, halves, strict=True):
        assert torch.equal(whole["latents"], torch.cat([part["latents"] for part in parts]))
    for workers in (0, 2):
        stream: Any = DataLoader(LatentStream(data, 6), batch_size=None, num_workers=workers)
        for one, other in zip(alone, islice(stream, len(alone)), strict=True):
            assert torch.equal(one["latents"], other["latents"])


def test_an_item_of_a_batch_is_the_item_of_the_dataset(store: Path) -> None:
    data = LatentDataset(store, view="random", columns=("key", "label", "original_size", "tags"))
    loader = data.loader(5)
    for epoch in range(2):
        data.set_epoch(epoch)
        batch = next(b for b in loader if len(set((b["index"] // 21).tolist())) == 1)
        for position, index in enumerate(batch["index"].tolist()):
            item = data[index]
            assert torch.equal(item["latents"], batch["latents"][position])
            assert item["key"] == batch["key"][position] and item["tags"] == batch["tags"][position]
            assert item["label"] == int(batch["label"][position])
            assert item["original_size"] == batch["original_size"][position].tolist()
        loader.set_epoch(epoch + 1)


def test_noise_and_views_are_new_each_epoch(store: Path) -> None:
    data = LatentDataset(store, view="random", raw=True)
    plain, flipped = (LatentDataset(store, view=view, raw=True) for view in ("", "flip"))
    shown: dict[int, set[str]] = {index: set() for index in range(21)}
    for _ in range(8):
        loader = data.loader(7)
        loader.set_epoch(_)
        for batch in loader:
            for index, mean in zip(batch["index"].tolist(), batch["mean"], strict=True):
                is_plain = torch.equal(mean, plain[index]["mean"])
                assert is_plain or torch.equal(mean, flipped[index]["mean"])
                shown[index].add("plain" if is_plain else "flip")
    assert sum(len(kinds) == 2 for kinds in shown.values()) >= 19
    loader = LatentDataset(store).loader(21)
    first, second = next(iter(loader)), next(iter(loader))
    assert sorted(first["index"].tolist()) == sorted(second["index"].tolist()) == list(range(21))
    assert not torch.equal(first["latents"][first["index"].argsort()], second["latents"][second["index"].argsort()])


SHAPES = {
    "mixed": {(4, 10, 14): 3, (4, 12, 12): 4, (4, 14, 10): 4},
    "clips": {(16, 1, 2, 2): 2, (16, 2, 2, 2): 6, (16, 3, 2, 2): 3},
}


@pytest.mark.parametrize("kind", [*SHAPES])
def test_a_batch_has_one_shape_and_all_shapes_come(kind: str, request: pytest.FixtureRequest) -> None:
    data = LatentDataset(request.getfixturevalue(kind))
    assert {shape: len(of) for shape, of in data.shapes().items()} == SHAPES[kind]
    seen: Counter[int] = Counter()
    loaders = [data.loader(1, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(4):
        for parts in zip(*loaders, strict=True):
            assert len({part["latents"].shape for part in parts}) == 1
            seen.update(index for part in parts for index in part["index"].tolist())
    assert set(seen) == set(range(11)) and set(seen.values()) == {4}
    items = data.__getitems__([0, 5, 10])  # without the loader: single items of their own shapes
    assert len({item["latents"].shape for item in items}) > 1


@pytest.mark.parametrize("kind", ["store", "mixed", "clips"])
def test_resume_goes_on_with_the_very_next_batch(kind: str, request: pytest.FixtureRequest) -> None:
    data = LatentDataset(request.getfixturevalue(kind))
    whole = data.loader(2, seed=3)
    everything = [batch for _ in range(3) for batch in whole]
    for stop, workers in ((0, 0), (1, 2), (7, 0), (len(everything) - 1, 1)):
        first = data.loader(2, seed=3, num_workers=workers)
        given = 0
        while given < stop:
            for _ in first:
                given += 1
                if given == stop:
                    break
        state = first.state_dict()
        second = data.loader(1, seed=3, world_size=2, rank=1)
        second.load_state_dict(state)
        rest = [batch for _ in range(3) for batch in second][: len(everything) - stop]
        for one, other in zip(everything[stop:], rest, strict=False):
            assert torch.equal(one["latents"][1:], other["latents"])
        stream = LatentStream(data, 2, seed=3)
        stream.load_state_dict(state)
        assert torch.equal(next(iter(stream))["latents"], everything[stop]["latents"])
    with refused(UsageError, "global_batch") as error:
        data.loader(4, seed=3).load_state_dict(state)
    assert "was 2, is 4" in str(error.value)
    with refused(UsageError, "seed") as error:
        data.loader(2, seed=4).load_state_dict(state)
    assert "was 3, is 4" in str(error.value)


def test_in_order_nothing_comes_twice_and_the_end_is_short(store: Path, mixed: Path) -> None:
    data = LatentDataset(store)
    assert indices(data.loader(8, shuffle=False)) == [list(range(8)), list(range(8, 16)), list(range(16, 21))]
    ranks = [indices(data.loader(4, shuffle=False, rank=rank, world_size=2)) for rank in range(2)]
    assert ranks == [[[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]], [[4, 5, 6, 7], [12, 13, 14, 15], [20]]]
    several = indices(LatentDataset(mixed).loader(3, shuffle=False))
    assert sorted(index for batch in several for index in batch) == list(range(11))
    loader = LatentLoader(data, 8, shuffle=False)
    assert len(loader) == 3 and len(list(loader)) == 3 and loader.epoch == 1


def test_after_an_update_the_right_rows_are_read(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Album(bad=(4,)), tmp_path / "u", **SETTINGS)
    write_store(tiny_vae, Album(**AFTER), tmp_path / "u", **SETTINGS, update=True)
    write_store(tiny_vae, Album(**AFTER), tmp_path / "fresh", **SETTINGS)
    fresh = {item["key"]: item["mean"] for item in LatentDataset(tmp_path / "fresh", raw=True)}
    data = LatentDataset(tmp_path / "u", raw=True, columns=("key", "caption"))
    batch = next(iter(data.loader(len(data))))
    assert sorted(batch["key"]) == sorted(fresh)
    for key, mean, caption in zip(batch["key"], batch["mean"], batch["caption"], strict=True):
        assert torch.equal(mean, fresh[key]) and caption == f"picture {int(key[-3:])}"


def test_pixels_come_with_their_view(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(6), tmp_path / "p", **SETTINGS, views="flip", pixels=True)
    plain, flip, random = (
        LatentDataset(tmp_path / "p", pixels=True, view=view, sample=False) for view in ("", "flip", "random")
    )
    assert torch.equal(plain[2]["pixels"].flip(2), flip[2]["pixels"]) and plain[2]["pixels"].dtype == torch.uint8
    for item in random:
        same = torch.equal(item["pixels"], plain[int(item["index"])]["pixels"])
        of = plain if same else flip
        assert torch.equal(item["pixels"], of[int(item["index"])]["pixels"])
        assert torch.equal(item["latents"], of[int(item["index"])]["latents"])
    write_store(tiny_vae, Pictures(6), tmp_path / "q", **SETTINGS)
    with refused(UsageError, "pixels"):
        LatentDataset(tmp_path / "q", pixels=True)


def test_one_of_several_resolutions(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(10), tmp_path / "r", **{**SETTINGS, "resolution": (16, 8)})
    assert len(LatentDataset(tmp_path / "r")) == 20
    small = LatentDataset(tmp_path / "r", resolution=8)
    assert len(small) == 10 and {item["latents"].shape for item in small} == {(4, 4, 4)}
    with refused(UsageError, "resolution") as error:
        LatentDataset(tmp_path / "r", resolution=32)
    assert "no 32; it has 16, 8" in str(error.value)
    with refused(UsageError, "view") as error:
        LatentDataset(tmp_path / "r", view="flip")
    assert "no 'flip'; it has '', 'random'" in str(error.value)


def test_wrong_numbers(store: Path) -> None:
    with refused(UsageError, "batch_size") as error:
        LatentDataset(store).loader(0)
    assert "at least 1, got 0" in str(error.value)
    with refused(UsageError, "rank") as error:
        LatentDataset(store).loader(1, rank=2, world_size=2)
    assert "0 to 1, got 2" in str(error.value)
