"""No draw comes twice: any sampler, any workers, any rank; and the same draws again after a resume."""

from __future__ import annotations

import copy
import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from fork_server import forkserver
from sentences import refused
from store_sources import Mixed
from stores import SETTINGS, encoded
from torch.utils.data import DataLoader, DistributedSampler, Sampler, WeightedRandomSampler

from ldm_vae.core.errors import UsageError
from ldm_vae.latent_store import LatentDataset, write_store
from ldm_vae.latent_store.read.visits import Visits

N = 21
Seen = list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pictures; no test changes it."""
    return encoded(tmp_path_factory.mktemp("visits")) / "latents"


def draws(batches: Iterable[Any]) -> Seen:
    """(index, draw) of every sample, as it was given."""
    return [
        (int(index), latents.numpy().tobytes())
        for batch in batches
        for index, latents in zip(batch["index"], batch["latents"], strict=True)
    ]


def none_twice(*passes: Seen) -> None:
    """Every draw is another one, whatever the sample."""
    every = Counter(draw for one in passes for draw in one)
    assert every and max(every.values()) == 1, "a draw came twice"


class Order(Sampler[int]):
    """Samples in one order, from a position on: what a trainer that resumes builds."""

    def __init__(self, order: list[int], start: int = 0) -> None:
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[int]:
        return iter(self.order[self.start :])

    def __len__(self) -> int:
        return len(self.order) - self.start


WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "fork": {"num_workers": 2, "multiprocessing_context": "fork"},
    "persistent": {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True},
    # one, which imports for seconds: two that were given a pickled dataset are those of the server
    "spawn": {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
    "forkserver": {"num_workers": 2, "multiprocessing_context": "forkserver", "persistent_workers": True},
}
SLOW = ("spawn", "forkserver")


@pytest.mark.parametrize(
    "workers", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in WORKERS]
)
def test_a_plain_data_loader_draws_anew_at_each_pass(workers: str, store: Path) -> None:
    if workers == "forkserver":
        forkserver()  # whose server has imported
    loader = DataLoader(LatentDataset(store), batch_size=4, shuffle=True, **WORKERS[workers])
    passes = [draws(loader) for _ in range(3)]
    none_twice(*passes)
    # each sample's are its first three, whatever the order and the workers
    data = LatentDataset(store)
    for one in passes:
        assert sorted(one) == sorted((index, data[index]["latents"].numpy().tobytes()) for index in range(N))


@pytest.mark.parametrize("workers", ["none", "fork", "persistent"])
def test_the_epoch_that_is_set_reaches_the_workers(workers: str, store: Path) -> None:
    data = LatentDataset(store)
    loader = DataLoader(data, batch_size=4, shuffle=True, **WORKERS[workers])
    given = data.loader(N)
    for epoch in range(3):
        data.set_epoch(epoch)
        data.set_epoch(epoch)  # which is under way: nothing begins again
        assert sorted(draws(loader)) == sorted(draws(given)), "the draws that the loader gives in this epoch"


def test_a_sampler_with_repetition(store: Path) -> None:
    data = LatentDataset(store)
    sampler = WeightedRandomSampler([1.0, 9.0, *[0.0] * (N - 2)], 400)
    loader = DataLoader(data, batch_size=8, sampler=sampler, num_workers=2, persistent_workers=True)
    none_twice(draws(loader), draws(loader), draws(data.__getitems__([0, 0, 1, -N]).batch for _ in range(2)))


def test_views_are_drawn_with_the_visit_and_what_is_no_draw_stays(store: Path) -> None:
    data = LatentDataset(store, view="random", raw="mean")
    assert len({data[3]["mean"].numpy().tobytes() for _ in range(20)}) == 2
    for options in ({"sample": False}, {"raw": True}, {"raw": "logvar"}):
        data = LatentDataset(store, **options)  # type: ignore[arg-type]
        first, second = data[3], data[3]
        assert all(torch.equal(value, second[name]) for name, value in first.items() if torch.is_tensor(value))
        assert len(data.state_dict()["visits"]) == 0, "and needs no memory"


def test_each_sample_of_a_batch_of_several_shapes_is_counted_once(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Mixed(11), tmp_path / "m", **{**SETTINGS, "resolution": 24, "bucket_step": 4})
    data = LatentDataset(tmp_path / "m")
    assert len({item["latents"].shape for item in data.__getitems__(range(11))}) > 1
    assert data.state_dict()["visits"].tolist() == [1] * 11


def test_a_copy_goes_on_for_itself(store: Path) -> None:
    data = LatentDataset(store)
    data.set_epoch(2)
    data[3]
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert twin.epoch == 2
        none_twice(draws([twin.__getitems__([3, 4]).batch]), draws([twin.__getitems__([3, 4]).batch]))
        assert data.state_dict()["visits"].sum() == 1
        expected = LatentDataset(store)
        expected.load_state_dict(data.state_dict())
        assert torch.equal(
            expected.__getitems__([3, 3])[1]["latents"], copy.deepcopy(data).__getitems__([3, 3])[1]["latents"]
        )


def test_no_memory_before_it_is_counted_in() -> None:
    visits = Visits(10**8)
    assert os.fstat(visits._descriptor).st_blocks == 0
    assert visits.next([10**8 - 1, 10**8 - 1]) == (0, [0, 1 << 32])
    assert os.fstat(visits._descriptor).st_blocks * 512 <= 2 * mmap.PAGESIZE


# --- several at once ----------------------------------------------------------------------------------------------


COUNTERS, EACH = 3, 100_000


class Zero:
    """Index 0, that Python code gives: a place where threads change."""

    def __index__(self) -> int:
        return 0


def count(visits: Visits, out: Path, ready: Any) -> None:
    zeros: Any = [Zero()] * 50
    ready.wait()
    out.write_bytes(pickle.dumps([number for _ in range(EACH // 50) for number in visits.next(zeros)[1]]))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_several_that_count_at_the_same_time(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    visits, files = Visits(1), [tmp_path / str(number) for number in range(COUNTERS)]
    context: Any = multiprocessing.get_context("fork")
    start = context.Process if kind == "processes" else threading.Thread
    ready = (context if kind == "processes" else threading).Barrier(COUNTERS, timeout=100)
    counters = [start(target=count, args=(visits, file, ready)) for file in files]
    for one in counters:
        one.start()
    for one in counters:
        one.join()
    found = [number for file in files for number in pickle.loads(file.read_bytes())]
    assert sorted(found) == [number << 32 for number in range(COUNTERS * EACH)]


def of_a_rank(store: str, group: str, out: str, rank: int, context: str) -> None:
    """Three passes of a DistributedSampler, which hands a sample to another rank in each; no launcher says the rank.

    A worker that is not forked has to be told that it is not of rank 0: rank 0 always forks its own."""
    context = context if rank else "fork"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    data = LatentDataset(store)
    sampler: Any = DistributedSampler(data, seed=1)
    loader = DataLoader(
        data, 4, sampler=sampler, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    passes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        passes.append(draws(loader))
    Path(out, str(rank)).write_bytes(pickle.dumps(passes))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_sample_that_moves_to_another_rank_is_drawn_anew(context: str, store: Path, tmp_path: Path) -> None:
    group = f"file://{tmp_path / 'group'}"
    start = multiprocessing.get_context("fork").Process
    children = [start(target=of_a_rank, args=(str(store), group, str(tmp_path), rank, context)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    ranks = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    first = {index for index, _ in ranks[0][0]}
    assert first & {index for index, _ in ranks[1][1]}, "samples do move"
    none_twice(*[one for passes in ranks for one in passes])


def test_the_launchers_rank(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in ("0", "1", "nonsense"):
        monkeypatch.setenv("RANK", rank)
        seen.append(draws([LatentDataset(store).__getitems__(range(N)).batch]))
    none_twice(*seen[:2])
    assert seen[2] == seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerates_loader(workers: int, store: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(LatentDataset(store), batch_size=4, shuffle=True, num_workers=workers)
    )
    given = draws([next(iter(loader))])  # a look at the first batch: the pass that is given up has the same number
    none_twice(*[draws(loader) for _ in range(3)], given)


# --- resume -------------------------------------------------------------------------------------------------------

ORDER = [5, 3, 5, 20, 0, 1, 5, 3, 9, 8, 7, 5, 5, 5, 2, 3]


def test_a_state_goes_on_behind_it(store: Path) -> None:
    """With repetition, in the middle of a pass, nothing read ahead."""
    whole = LatentDataset(store)
    expected = [draws(DataLoader(whole, 2, sampler=Order(ORDER))) for _ in range(3)]
    first = LatentDataset(store)
    given = draws(DataLoader(first, 2, sampler=Order(ORDER)))
    loader = iter(DataLoader(first, 2, sampler=Order(ORDER)))
    given += draws(next(loader) for _ in range(3))
    second = LatentDataset(store)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    given += draws(DataLoader(second, 2, sampler=Order(ORDER, 6)))
    given += draws(DataLoader(second, 2, sampler=Order(ORDER)))
    assert given == [draw for one in expected for draw in one]


@pytest.mark.parametrize("workers", ["none", "fork", "persistent"])
def test_epochs_that_are_set_resume_exactly_whatever_was_read_ahead(workers: str, store: Path) -> None:
    order = torch.randperm(N).tolist()

    def passes(data: LatentDataset, epoch: int, start: int = 0) -> Iterator[Any]:
        data.set_epoch(epoch)
        return iter(DataLoader(data, 2, sampler=Order(order, start), **WORKERS[workers]))

    data = LatentDataset(store)
    expected = [draws(passes(data, epoch)) for epoch in range(3)]
    first = LatentDataset(store)
    given = draws(passes(first, 0))
    under_way = passes(first, 1)
    given += draws(next(under_way) for _ in range(4))
    given += draws(passes(second := LatentDataset(store), 1, 8))
    given += draws(passes(second, 2))
    assert given == [draw for one in expected for draw in one]


def test_a_state_repeats_no_draw_whatever_was_read_ahead(store: Path) -> None:
    data = LatentDataset(store)
    under_way = iter(DataLoader(data, 2, sampler=Order(list(range(N))), num_workers=2))
    given = draws(next(under_way) for _ in range(3))
    state = data.state_dict()
    after = LatentDataset(store)
    after.load_state_dict(state)
    rest = draws(DataLoader(after, 2, sampler=Order(list(range(N)), 6), num_workers=2))
    none_twice(given, rest, draws(DataLoader(after, 2, num_workers=2)))


def test_accelerates_loader_resumes(store: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)

    def loader(data: LatentDataset) -> Any:
        return accelerator.prepare(DataLoader(data, batch_size=4, sampler=Order(list(range(N)))))

    whole = loader(LatentDataset(store))
    expected = [draws(whole) for _ in range(3)]
    again = loader(LatentDataset(store))
    again.set_epoch(1)
    given = draws(skip_first_batches(again, 2))
    again.set_epoch(2)
    assert [given, draws(again)] == [expected[1][8:], expected[2]]


def test_what_a_state_does_not_fit_and_an_epoch_that_goes_back(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = LatentDataset(store).state_dict()
    with refused(UsageError, "seed"):
        LatentDataset(store, seed=1).load_state_dict(state)
    with refused(UsageError, "samples"):
        LatentDataset(store).load_state_dict({**state, "samples": 20})
    monkeypatch.setenv("RANK", "1")
    with refused(UsageError, "rank"):
        LatentDataset(store).load_state_dict(state)
    monkeypatch.delenv("RANK")
    data = LatentDataset(store)
    first = data[0]["latents"]
    data.set_epoch(3)
    with pytest.warns(UserWarning, match="0 after 3"):
        data.set_epoch(0)
    assert torch.equal(first, data[0]["latents"])
