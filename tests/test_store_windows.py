"""Reading by windows: each row once an epoch, few shards at a time, the same for any ranks, resumed to the batch."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refused
from store_sources import Mixed
from stores import SETTINGS
from upstream import serving

from eval.speed.synthetic_store import write_synthetic
from ldm_vae.core.errors import UsageError
from ldm_vae.data.sampler import Order
from ldm_vae.diffusion.config import DiffusionTraining
from ldm_vae.latent_store import LatentDataset, write_store
from ldm_vae.latent_store.format.layout import TENSORS
from ldm_vae.latent_store.read import mapped_files
from ldm_vae.latent_store.read.mapped_files import LocalFiles
from ldm_vae.latent_store.read.prefetch import THREADS
from ldm_vae.latent_store.read.windows import WindowedOrder
from ldm_vae.run.store_training import StoredSamples

SHARDS, ROWS = 12, 8  # of the synthetic store, whose last shard is short
COUNT = SHARDS * ROWS - 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic store in FOLDER/latents."""
    folder = tmp_path_factory.mktemp("windows")
    write_synthetic(folder / "latents", COUNT, (2, 2, 2), unit=ROWS)
    return folder


def epoch_of(order: WindowedOrder, epoch: int) -> list[int]:
    """The rows of an epoch, in their order."""
    return [order.task(position).index for position in range(epoch * order.count, (epoch + 1) * order.count)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 14), lanes=st.integers(1, 4),
    each=st.integers(1, 6), epoch=st.integers(0, 3),
)  # fmt: skip
def test_each_row_once_an_epoch(rows: list[int], window: int, lanes: int, each: int, epoch: int) -> None:
    order = WindowedOrder(3, np.array(rows), window, lanes, lanes * each)
    assert sorted(epoch_of(order, epoch)) == list(range(sum(rows)))
    # any position is found without those before it
    position = epoch * order.count + order.count // 2
    assert WindowedOrder(3, np.array(rows), window, lanes, lanes * each).task(position) == order.task(position)


@pytest.mark.parametrize("window", [1, 3, 30])
def test_a_shard_comes_once_and_no_more_than_the_window_are_open(window: int) -> None:
    rows = np.array([7, 9, 8, 8, 8, 1, 8, 8, 8, 8])
    shard_of = np.repeat(np.arange(len(rows)), rows)
    order = WindowedOrder(0, rows, window, 1, 4)
    orders = []
    for epoch in range(3):
        found = shard_of[epoch_of(order, epoch)]
        open_from = [int(np.flatnonzero(found == shard)[0]) for shard in range(len(rows))]
        open_to = [int(np.flatnonzero(found == shard)[-1]) for shard in range(len(rows))]
        opened = [sum(a <= place <= b for a, b in zip(open_from, open_to, strict=True)) for place in range(len(found))]
        assert min(window, len(rows) - 2) <= max(opened) <= window, "they are used as well"
        orders.append(np.argsort(open_from).tolist())
    assert len({tuple(once) for once in orders}) == 3, "another order of shards each epoch"


def test_a_window_of_all_shards_is_as_good_as_the_permutation() -> None:
    """Mean distance of rows that are neighbours in the store: (N + 1) / 3 in a uniform order."""
    rows = np.full(20, 50)
    distances = []
    for order in (WindowedOrder(0, rows, 20, 1, 10), Order(0, 1000), WindowedOrder(0, rows, 1, 1, 10)):
        place = np.empty(1000)
        place[[order.task(position).index for position in range(1000)]] = np.arange(1000)
        distances.append(np.abs(np.diff(place)).mean())
    assert distances[:2] == pytest.approx([1001 / 3] * 2, rel=0.07)  # standard error 2.4 %
    assert distances[2] < 50, "of windows of one shard nearly all are of one segment"


def test_lanes_read_shards_of_their_own(folder: Path) -> None:
    data = LatentDataset(folder / "latents", raw="mean", columns=())

    def read(lanes: int, ranks: int, epochs: int = 4) -> list[list[list[int]]]:
        loaders = [data.loader(12 // ranks, window=2, lanes=lanes, rank=r, world_size=ranks) for r in range(ranks)]
        return [[b["index"].tolist() for _ in range(epochs) for b in loader] for loader in loaders]

    ranks = read(3, 3)
    seen = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(ranks)))
    assert set(seen) == set(range(COUNT)) and set(seen.values()) == {4}, "4 epochs of 93 are 31 batches of 12"
    for number in (1, 2, 6):  # and the same global batches on another number of ranks
        whole = [list(itertools.chain(*parts)) for parts in zip(*read(3, number), strict=True)]
        assert whole == [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    # of an epoch: a third of the shards, and two for each border; the second begins in the middle of a batch
    for (rank, alone), first in itertools.product(zip(ranks, read(1, 3), strict=True), (0, 8)):
        shards, of_one_lane = ({i // ROWS for batch in b[first : first + 7] for i in batch} for b in (rank, alone))
        assert len(shards) <= SHARDS // 3 + 3 < len(of_one_lane)


@pytest.mark.parametrize("lanes", [1, 2])
def test_shapes_workers_and_resume_are_as_without_a_window(lanes: int, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Mixed(11), tmp_path / "m", **{**SETTINGS, "resolution": 24, "bucket_step": 4})
    data = LatentDataset(tmp_path / "m")
    options: dict[str, Any] = {"seed": 3, "window": 1, "lanes": lanes}
    whole = data.loader(2, **options)
    everything = [batch for _ in range(4) for batch in whole]
    if lanes == 2:
        for one, other in zip(everything, data.loader(2, num_workers=1, **options), strict=False):
            assert torch.equal(one["latents"], other["latents"])
    seen = Counter(index for batch in everything for index in batch["index"].tolist())
    assert set(seen) == set(range(11)) and set(seen.values()) == {4}
    for stop in (1, 7):
        first = data.loader(2, **options)
        for _ in itertools.islice(itertools.chain.from_iterable(first for _ in range(4)), stop):
            pass
        parts = [data.loader(1, world_size=2, rank=rank, **options) for rank in range(2)]
        for part in parts:
            part.load_state_dict(first.state_dict())
        rest = [[batch for _ in range(4) for batch in part] for part in parts]
        for one, halves in zip(everything[stop:], zip(*rest, strict=True), strict=False):
            assert torch.equal(one["latents"], torch.cat([half["latents"] for half in halves]))


def test_the_state_names_what_the_order_depends_on(folder: Path, tmp_path: Path) -> None:
    data = LatentDataset(folder / "latents")
    state = data.loader(4, window=2, lanes=2).state_dict()
    for name, options in (("window", {"window": 3, "lanes": 2}), ("lanes", {"window": 2}), ("window", {})):
        with refused(UsageError, name):
            data.loader(4, **options).load_state_dict(state)
    with refused(UsageError, "window"):
        data.loader(4, window=2, lanes=2).load_state_dict(data.loader(4).state_dict())
    write_synthetic(tmp_path / "merged", COUNT, (2, 2, 2), unit=2 * ROWS)
    with refused(UsageError, "shards"):  # as many samples in other shards
        LatentDataset(tmp_path / "merged").loader(4, window=2, lanes=2).load_state_dict(state)
    for options in ({"window": 0}, {"window": 2, "shuffle": False}):
        with refused(UsageError, "window"):
            data.loader(4, **options)
    for options in ({"window": 2, "lanes": 3}, {"window": 2, "lanes": 0}, {"lanes": 2}):
        with refused(UsageError, "lanes"):
            data.loader(4, **options)


def test_a_cache_of_a_window_is_enough(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(mapped_files, "LOOK_EVERY", 0.0)
    monkeypatch.setattr("ldm_vae.latent_store.read.prefetch.SHARDS", 2)
    local = LatentDataset(folder / "latents", columns=())
    each = max(shard.stored_bytes for shard in local.shards)
    with serving(folder) as upstream:
        remote = LatentDataset(f"{upstream.url}/latents", columns=(), cache_bytes=8 * each)
        loader, plain = remote.loader(3, window=2), local.loader(3, window=2)
        for one, other in zip(loader, plain, strict=True):
            assert torch.equal(one["latents"], other["latents"])
            held = sum(path.stat().st_size for path in (tmp_path / "ldm-vae" / "stores").glob(f"*.{TENSORS}"))
            assert held <= (8 + THREADS) * each, "the limit, and what is on its way"
        asked = {name: count for name, count in upstream.asked.items() if name.endswith(TENSORS)}
        # those of the next epoch's beginning were asked for already, two and two more
        assert len(asked) == SHARDS and sum(asked.values()) <= SHARDS + 4
        with pytest.warns(UserWarning, match="2 shards at once and 2 ahead need a cache"):
            LatentDataset(f"{upstream.url}/latents", columns=(), cache_bytes=7 * each).loader(3, window=2)
        with pytest.warns(UserWarning, match="a `window` of shards"):
            LatentDataset(f"{upstream.url}/latents", columns=(), cache_bytes=7 * each).loader(3)


def test_a_folder_is_read_ahead_of_a_window_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[str] = []
    bring = LocalFiles.bring

    def record(self: LocalFiles, shard: Any, *args: Any, **more: Any) -> None:
        bring(self, shard, *args, **more)
        brought.append(shard.name)

    monkeypatch.setattr(LocalFiles, "bring", record)
    monkeypatch.setattr("ldm_vae.latent_store.read.prefetch.SHARDS", 2)
    data = LatentDataset(folder / "latents", columns=())
    next(iter(data.loader(2)))
    assert not brought
    batches = iter(data.loader(2, window=2))
    given = {int(index) // ROWS for index in next(batches)["index"]}
    until = time.monotonic() + 60
    while len(brought) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert len({*brought}) == len(brought) == 5, "two, two more, and the one that fills the sight"
    assert given <= {int(name) for name in brought}


def test_a_training_reads_by_the_windows_of_its_config(folder: Path) -> None:
    data = LatentDataset(folder / "latents")
    settings = DiffusionTraining(output_dir=Path("unused"), latents="unused", train_batch_size=2, window=2, lanes=2)
    alone: Any = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"))
    loader = StoredSamples(data, (2, 2, 2), None, (), None, 0).loader(settings, alone)
    assert loader.state_dict() == data.loader(2, window=2, lanes=2, rank=1, world_size=2).state_dict()
