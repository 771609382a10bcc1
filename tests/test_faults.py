"""What the world does to a running program: a process of the launch that dies or hangs, a data worker that the kernel
kills, data that vanish, a target that cannot be written. One sentence, status 1, and the same command goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import current_process
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import _resource_sharer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from checksums import tree
from failing_data import Failing, memory_error
from fork_server import Child, fork
from images import write_images
from kills import fork_until, launch_program, ranks, wait_for, wait_until
from launcher import ACCELERATE
from repository import ROOT
from training_runs import metrics, newest, one_sentence, run, start, write_config

from ldm_vae import cli
from ldm_vae.core import ownership, parent_process
from ldm_vae.core.errors import WorkError, environment_failure
from ldm_vae.data import workers
from ldm_vae.data.workers import load
from train import autoencoder as training_program

LONG = {"max_train_images": 100_000, "log_every_images": 8, "checkpoint_every_images": 16}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 11)


def two_ranks(folder: Path, images: Path, *flags: str) -> tuple[Path, list[Child]]:
    """Two processes that have trained so far that there is a checkpoint."""
    config = write_config(folder, images, train_batch_size=1, **LONG)
    both = ranks(training_program.main, [str(config), *flags], 2)
    wait_for(folder / "run" / "checkpoints" / "images-000000016", both[0])
    return config, both


# --- another process --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_sentence(images: Path, tmp_path: Path) -> None:
    config, (first, second) = two_ranks(tmp_path, images)
    second.kill(signal.SIGKILL)
    said = one_sentence(first.wait(), 1)
    assert "another process of this launch died" in said and "the same command goes on" in said
    assert second.wait().returncode == -signal.SIGKILL
    last = int(newest(tmp_path / "run").name.removeprefix("images-"))
    again = ranks(training_program.main, [str(config), "--max_train_images", str(last + 4)], 2)
    done = [rank.wait() for rank in again]
    assert [rank.returncode for rank in done] == [0, 0], done
    assert f"at {last:,} images" in done[0].stdout and metrics(tmp_path / "run")[-1]["images"] == last + 4


@pytest.mark.slow  # the seconds must be more than a busy machine takes to bring both to a meeting
def test_a_rank_that_hangs_ends_the_others_in_the_time_that_was_set(images: Path, tmp_path: Path) -> None:
    _, (first, second) = two_ranks(tmp_path, images, "--ddp_timeout", "20")
    second.kill(signal.SIGSTOP)
    said = one_sentence(first.wait(), 1)
    assert "another process of this launch does not answer (ddp_timeout)" in said
    second.kill(signal.SIGKILL)
    assert second.wait().returncode == -signal.SIGKILL


@pytest.mark.slow
def test_under_a_launcher_a_dead_rank_ends_the_rest(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, train_batch_size=1, **LONG)
    program = launch_program(["-m", "train.autoencoder", str(config)], processes=2)
    wait_for(tmp_path / "run" / "checkpoints" / "images-000000016", program)
    rank = max(program.members(), key=lambda member: member.pid)
    rank.kill()
    done = program.wait()
    assert done.returncode != 0
    assert "ddp_timeout" not in done.stderr and done.stderr.count("error: another process of this launch died") <= 1


LAUNCHED = """
import os, sys, time
from pathlib import Path
import ldm_vae
here, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
(here / f"{rank}.importing").touch()
while rank == "0" and not (here / "go").exists():  # as if it took so long to import torch
    time.sleep(0.01)
from ldm_vae.core.launch import ON_THEIR_OWN, build_accelerator
(here / f"{rank}.meeting").touch()
build_accelerator(ddp_timeout=ON_THEIR_OWN)
(here / f"{rank}.working").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("while_they_are", "processes"), [(["0.working"], 1), (["0.importing"], 1), (["0.importing", "1.meeting"], 2)]
)
def test_a_launcher_that_dies_is_missed(while_they_are: list[str], processes: int, tmp_path: Path) -> None:
    """By one who works, by one who imports, and by one who waits for such a one in a collective."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    alone = [*ACCELERATE, "--num_processes", "1"] if processes == 1 else []
    program = launch_program([*alone, str(script), str(tmp_path)], processes)
    if "0.working" in while_they_are:
        (tmp_path / "go").touch()
    wait_until(lambda: all((tmp_path / name).exists() for name in while_they_are), program)
    orphans = program.kill_alone()
    assert len(orphans) >= processes
    (tmp_path / "go").touch()
    _, alive = psutil.wait_procs(orphans, timeout=300)
    assert alive == [], "orphans stop: they do not wait for days, nor write into the run of the next launch"
    assert "error: the launcher is gone" in program.wait().stderr


def test_programs_ask_who_started_them_before_they_import_torch() -> None:
    for package in ("ldm_vae", "train", "eval"):
        wrong = "'torch' in sys.modules or 'ldm_vae.core.parent_process' not in sys.modules"
        asked = f"import sys, {package}; sys.exit({wrong})"
        assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT, check=False).returncode == 0, package


def ask() -> None:
    assert not parent_process.is_gone()


def test_a_forked_process_has_another_parent() -> None:
    assert fork(ask, []).wait().returncode == 0


def train_impatiently() -> None:
    ownership.WAIT_SECONDS = 1
    training_program.main()


@pytest.mark.slow
def test_two_trainings_never_write_into_one_folder(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, **LONG)
    first = fork(training_program.main, [str(config)])
    wait_for(tmp_path / "run" / "checkpoints" / "images-000000016", first)
    second = fork(train_impatiently, [str(config)]).wait()
    assert "output_dir" in one_sentence(second, 2)
    assert first.running()
    first.kill(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    last = int(newest(tmp_path / "run").name.removeprefix("images-"))
    assert fork(train_impatiently, [str(config), "--max_train_images", str(last + 2)]).wait().returncode == 0


# --- data workers -----------------------------------------------------------------------------------------------------


def kill_a_worker(victim: Child) -> None:
    """As the kernel does when memory runs out. The victim stands still: its workers cannot come to their end before."""
    both = psutil.Process(victim.process.pid).children()
    assert len(both) == 2
    both[-1].kill()
    victim.kill(signal.SIGCONT)


@pytest.mark.slow
def test_a_data_worker_killed_for_memory(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, **LONG)
    command = [str(config), "--dataloader_num_workers", "2"]
    victim = fork_until(tmp_path / "run/checkpoints/images-000000016", training_program.main, command)
    kill_a_worker(victim)
    said = one_sentence(victim.wait(), 1)
    assert "a data worker died" in said and "dataloader_num_workers" in said
    last = int(newest(tmp_path / "run").name.removeprefix("images-"))
    assert run(config, "--max_train_images", str(last + 2)).returncode == 0


@pytest.mark.slow
def test_a_worker_of_encoding_killed_for_memory(tiny_vae_folder: Path, tmp_path: Path) -> None:
    data = [str(write_images(tmp_path / "photographs", 160)), str(tmp_path / "store")]
    size = ["--resolution", "32", "--batch_size", "4", "--shard_size", "8", "--num_workers", "2"]
    command = ["encode", str(tiny_vae_folder), *data, *size]
    victim = fork_until(tmp_path / "store/units/00000002.json", cli.main, command)
    kill_a_worker(victim)
    assert "a data worker died" in one_sentence(victim.wait(), 1)
    assert fork(cli.main, command).wait().returncode == 0


class Deserted:
    """A dataset whose worker is asked for a tensor by somebody who leaves while asking, as a main process that ends."""

    def __getitems__(self, tasks: list[int]) -> torch.Tensor:
        noticed = threading.Event()
        address, last = _resource_sharer.register(lambda _connection, _process: None, noticed.set)
        for _ in tasks:
            Client(address, authkey=None).close()
        with Client(address, authkey=current_process().authkey) as connection:  # its thread answers one after the other
            connection.send((last, os.getpid()))
        assert noticed.wait(300)
        return torch.zeros(1)


def test_a_worker_does_not_say_that_the_main_process_has_left(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(list(load(Deserted(), [[0, 1]], num_workers=1))) == 1
    assert capfd.readouterr().err == ""


class Torn:
    """A batch whose worker is gone when it is to be taken."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return tear, ()


def tear() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


class Tearing:
    """A dataset of them."""

    def __getitems__(self, tasks: list[int]) -> Torn:
        return Torn()


class Unpicklable(Exception):
    """An error that does not come back as it was: its class takes another number of arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def out_of_shared_memory() -> torch.Tensor:
    """A batch for which there is no room in /dev/shm; a limit of file sizes is one of shared memory too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return torch.zeros(100_000)


def unpicklable_error() -> None:
    class Local(Exception):
        pass

    raise Local("of a function")


def other_arguments() -> None:
    raise Unpicklable("an", "error")


def unpicklable_batch() -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (out_of_shared_memory, "shm"), (unpicklable_error, "Local"), (memory_error, "MemoryError"),
        (other_arguments, "Unpicklable"), (unpicklable_batch, "pickle"), (sys.exit, "SystemExit"),
        (lambda: None, "pickle"), (partial(os._exit, 0), "exited"), (partial(os._exit, 3), "exited"),
    ],
)  # fmt: skip
def test_whatever_befalls_a_worker_is_a_sentence(work: Callable[[], Any], says: str) -> None:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    signal.alarm(60)
    try:
        with pytest.raises(WorkError, match=says) as error:  # and torch's and Python's words, so not golden
            list(load(Failing(), [[work]] * 3, num_workers=1, context="fork"))
    finally:
        signal.alarm(0)
    assert "--num_workers" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_worker_that_cannot_import_the_data_is_a_sentence() -> None:
    with pytest.raises(WorkError, match="exited"):
        list(load(Failing(broken=True), [[memory_error]], num_workers=1, context="spawn"))
    with pytest.raises(WorkError, match="cannot be started"):
        list(load(unpicklable_batch(), [[memory_error]], num_workers=1, context="spawn"))


@pytest.mark.parametrize("is_told", [False, True])
def test_a_connection_that_a_worker_took_with_it_is_its_death(is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {child.pid for child in psutil.Process().children()}  # the server of forked children, by what ran before

    def wait(seconds: float) -> None:  # the kernel tells of the death in this time, or never
        assert seconds == workers.GRACE
        if is_told:
            (worker,) = [child for child in psutil.Process().children() if child.pid not in others]
            worker.kill()
            time.sleep(60)

    monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=wait))
    with pytest.raises(WorkError, match="dataloader_num_workers") as said:  # and torch's words, so not golden
        list(load(Tearing(), [[0, 1]], num_workers=1))
    assert ("killed by signal" in str(said.value)) == is_told


# --- the data and the target ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_that_vanish_while_they_are_used(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "there")
    config = write_config(tmp_path, tmp_path / "there", **LONG)
    victim = start(config)
    wait_for(tmp_path / "run" / "checkpoints" / "images-000000016", victim)
    shutil.rmtree(tmp_path / "there")
    said = one_sentence(victim.wait(), 1)
    assert "no usable image among 11" in said and "no such file" in said
    shutil.copytree(images, tmp_path / "there")
    last = int(newest(tmp_path / "run").name.removeprefix("images-"))
    assert run(config, "--max_train_images", str(last + 2)).returncode == 0


@pytest.mark.slow
def test_a_target_that_cannot_be_written(images: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, images, output_dir="/sys/run", max_train_images=8)
    assert "/sys/run" in one_sentence(run(config), 1)


def on_a_full_disk() -> None:
    """`ldm-vae` where no file may grow beyond 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    cli.main()


def test_an_export_to_a_full_disk_leaves_the_older_one(tiny_vae_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "mine"
    assert fork(cli.main, ["export", str(tiny_vae_folder), str(out)]).wait().returncode == 0
    before = tree(out.parent)
    said = one_sentence(fork(on_a_full_disk, ["export", str(tiny_vae_folder), str(out)]).wait(), 1)
    assert "large" in said  # the kernel's words for a file that may not grow
    assert tree(out.parent) == before


def test_only_what_nobody_can_help_becomes_a_sentence() -> None:
    assert (
        str(environment_failure(OSError(28, "No space left on device", "/x")))
        == "[Errno 28] No space left on device: '/x'"
    )
    assert "out of memory" in str(environment_failure(MemoryError()))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50)
    assert "out of memory" in str(environment_failure(failed.value))
    assert environment_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert environment_failure(KeyError("x")) is None
