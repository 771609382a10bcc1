"""`encode --engine ray`: a cluster of two nodes of which one is killed; and the engine with calls of Ray that follow a
script."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from checksums import tree
from cli_call import call
from diffusers import AutoencoderKL
from images import write_images
from ray.cluster_utils import Cluster
from ray.exceptions import ActorUnavailableError, RayTaskError
from sentences import refused
from stores import SETTINGS

from ldm_vae import LatentDataset, open_images
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import verify, write_store
from ldm_vae.latent_store.format.work_units import Unit
from ldm_vae.latent_store.write import ray_actor, ray_engine
from ldm_vae.latent_store.write.processes import Job, Processes
from ldm_vae.latent_store.write.ray_actor import Actor, Inputs, Told
from ldm_vae.latent_store.write.ray_engine import RayEngine

# --- a cluster --------------------------------------------------------------------------------------------------------

# actors read the images from the 32nd on when the file `go` is there; who waits for it says so
GATED = """
import os, time
from pathlib import Path
from ldm_vae.data.sources import folder

class Gated(folder.FolderSource):
    def __getitem__(self, index):
        while index >= 32 and "DRIVER" not in os.environ and not Path("go").exists():
            Path(f"waits-{os.getpid()}").touch()
            time.sleep(0.05)
        return super().__getitem__(index)

class Config(folder.Config):
    kind: str = "gated.images"

    def build(self):
        source = super().build()
        source.__class__ = Gated
        return source
"""

FAST = {  # a node that is gone is seen after two seconds, and not after half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of a CPU each, on this machine."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the cluster, also if it lives elsewhere
    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False, "include_log_monitor": False}
    head = {**node, "temp_dir": str(folder), "_system_config": FAST, "no_monitor": True}
    try:
        found = Cluster(True, head_node_args=head)
    except Exception:  # a busy machine: Ray gives up after 30 s, and a second time is faster
        found = Cluster(True, head_node_args=head)
    try:
        found.add_node(**node)
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_is_killed_and_another_number_of_actors_resumes(
    cluster: Cluster, tiny_vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # actors of a cluster on this machine do so too: names are relative
    (tmp_path / "gated").mkdir()
    (tmp_path / "gated" / "images.py").write_text(GATED)
    monkeypatch.setenv("DRIVER", "")  # and of its data workers; the nodes' processes run already
    write_images(tmp_path / "all", 80)
    (tmp_path / "data").mkdir()
    images = sorted((tmp_path / "all").iterdir())
    images[3].write_text("no image")
    images[77].write_text("no image")
    for image in images[:24]:
        shutil.copy(image, tmp_path / "data")
    words = ["encode", "tiny_vae", "data", "--resolution", 32, "--batch_size", 4, "--shard_size", 4]
    words += ["--kind", "gated.images"]
    call(*words[:3], "plain", *words[3:])
    shutil.copytree("plain", "store")
    # an update: the driver compares, actors encode what is new
    for image in images[24:]:
        shutil.copy(image, tmp_path / "data")
    words += ["--update"]
    on_ray = ["--engine", "ray", "--ray_address", cluster.address]

    def kill() -> None:
        """A node, when both actors have begun; then, when one of them is dead, let the other one go on."""
        while len(both := [*tmp_path.glob("waits-*")]) < 2:
            time.sleep(0.05)
        cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
        while all(is_alive(int(one.name.removeprefix("waits-"))) for one in both):
            time.sleep(0.05)
        (tmp_path / "go").touch()

    def stop(_bar: Any, sentence: str) -> None:
        said.append(sentence)
        if sentence.startswith("note: lost"):
            os.kill(os.getpid(), signal.SIGINT)

    said, say = list[str](), ray_engine.Progress.say
    monkeypatch.setattr(ray_engine.Progress, "say", stop)
    killer = Thread(target=kill)
    killer.start()
    # a shell without job control has its background commands ignore Ctrl-C, and this process with them
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            call(*words[:3], "store", *words[3:], *on_ray, "--actors", 3)
    finally:
        signal.signal(signal.SIGINT, before)
    killer.join()
    assert "have room for 2 of 3 actor(s) of 1 CPU(s) and 0 GPU(s)" in capfd.readouterr().err
    done = len([*(tmp_path / "store" / "units").glob("*.json")])
    assert 8 <= done < 20, "units 6 and 7 were done, the one of the killed node was not"
    monkeypatch.setattr(ray_engine.Progress, "say", say)
    call(*words[:3], "store", *words[3:], *on_ray, "--actors", 1)
    assert not ray.is_initialized()
    call(*words[:3], "plain", *words[3:])
    assert tree(tmp_path / "store") == tree(tmp_path / "plain") and verify(tmp_path / "store") == []
    data = LatentDataset(tmp_path / "store", columns=("key",))
    expected = [f"img_{index:04d}.png" for index in range(80) if index not in (3, 77)]
    assert sorted(data[index]["key"] for index in range(len(data))) == expected


# --- an actor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, as an actor of a cluster sees it."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "1"))
    monkeypatch.setattr(ray_actor.socket, "gethostname", lambda: "worker-7")


@pytest.mark.usefixtures("node")
def test_an_actor_encodes_what_the_driver_sees_and_nothing_else(
    tiny_vae: AutoencoderKL, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    source, out = open_images(image_folder, tiny_vae), tmp_path / "s"
    (image_folder / "img_0004.png").write_text("no image")
    inputs, version = Inputs(str(tiny_vae_folder), str(image_folder)), ray_engine.__version__
    told = list[Told]()

    def engine(job: Job, units: Sequence[Unit]) -> None:
        write_images(tmp_path / "others", 11)
        other = copy.deepcopy(tiny_vae)
        other.encoder.conv_in.bias.data += 1  # type: ignore[union-attr,operator]
        other.save_pretrained(tmp_path / "other_vae")
        for names, kind, word in (
            ({"vae": str(tmp_path / "none")}, UsageError, "worker-7"),
            ({"vae": str(tmp_path / "other_vae")}, UsageError, "VAE"),
            ({"data": str(tmp_path / "none")}, UsageError, "worker-7"),
            ({"data": str(tmp_path / "others")}, UsageError, "DATA"),
        ):
            with refused(kind, word):
                Actor(job, replace(inputs, **names), version).begin()
        with refused(WorkError, "version"):
            Actor(job, inputs, "0.0.0").begin()
        with refused(UsageError, "worker-7"):
            Actor(replace(job, out=tmp_path / "elsewhere"), inputs, version).begin()
        with refused(WorkError, "worker-7"):
            Actor(replace(job, owner=replace(job.owner, record=b"another")), inputs, version).begin()
        actor = Actor(job, inputs, version)
        told.append(actor.begin())
        told.extend(actor.encode(unit) for unit in reversed(units))

    settings = SETTINGS | {"source_name": str(image_folder), "vae_name": str(tiny_vae_folder)}
    write_store(tiny_vae, source, out, **settings, processes=Processes(engine=engine))
    write_store(tiny_vae, source, tmp_path / "plain", **settings)
    assert tree(out) == tree(tmp_path / "plain")
    assert [one.bad for one in told] == [0, 0, 1] and {one.node for one in told} == {"worker-7"}


# --- the driver -------------------------------------------------------------------------------------------------------

Answer = Callable[[str, Unit | None], int]
"""(actor, unit or None: it begins) => bad samples; or raises."""


@dataclass(eq=False)
class Call:
    actor: str
    unit: Unit | None


@dataclass(eq=False)
class Handle:
    """A handle of an actor; its methods too: `handle.encode.remote(unit)`."""

    name: str
    calls: list[Call]

    def __getattr__(self, _method: str) -> Handle:
        return self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, unit: Unit | None = None) -> Call:
        self.calls.append(Call(self.name, unit))
        return self.calls[-1]


@dataclass
class Script:
    """Part of Ray that the engine calls; an actor answers as `answer` says. Those in `pending` have no place; nodes are
    named as their actor."""

    answer: Answer = lambda actor, unit: 0
    pending: str = ""
    dead: str = ""
    calls: list[Call] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    exceptions = ray.exceptions

    def run(self, actors: int) -> list[tuple[str, int]]:
        """Deal six units; by whom each was done, in the order in which they were asked for."""
        names = iter("0123456789")
        made = SimpleNamespace(remote=lambda *_: Handle(next(names), self.calls))
        self.remote = lambda _kind: SimpleNamespace(options=lambda **_: made)
        units = [Unit(number, range(4 * number, 4 * number + 4)) for number in range(6)]
        engine = RayEngine(self, Inputs("vae", "data"), actors, 1, 0, 0, 1)
        engine(Job(Path("s"), *[None] * 4, 4, 0, 1), units)  # type: ignore[arg-type]
        return [(call.actor, call.unit.number) for call in self.calls if call.unit is not None]

    def wait(self, calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        actors = [call.actor for call in calls]
        assert len(actors) == len({*actors}), "an actor has one unit at a time"
        return [call for call in calls if call.actor not in self.pending][:1], []

    def get(self, call: Call) -> Told:
        return Told("worker", call.actor, self.answer(call.actor, call.unit))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": name not in self.dead} for name in "0123456789"]

    def kill(self, actor: Handle) -> None:
        self.killed.append(actor.name)


def fail(unit: Unit | None) -> int:
    raise RayTaskError("encode", "a traceback", WorkError(f"node worker: no space for {unit and unit.number}"))


def vanish() -> int:
    raise ActorUnavailableError("Socket closed", b"0" * 16)


def test_an_actor_without_a_place_is_given_nothing_and_the_others_do_all() -> None:
    script = Script(pending="0")
    done = script.run(3)
    assert {actor for actor, _ in done} == {"1", "2"} and sorted(unit for _, unit in done) == [*range(6)]
    assert {*script.killed} == {"0", "1", "2"}
    many = Script()
    many.run(9)
    assert len(many.calls) == 12, "no more actors are started than there are units"


def test_a_unit_that_fails_is_tried_after_the_others_and_ends_the_work_at_the_third_time() -> None:
    script = Script(lambda _actor, unit: fail(unit) if unit and unit.number == 1 else 0)
    with refused(WorkError, "unit 1"):
        script.run(2)
    assert sorted(call.unit.number for call in script.calls if call.unit) == [0, 1, 1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dead", ["", "0"])
def test_a_unit_whose_nodes_are_lost_goes_on_and_one_that_ends_its_processes_does_not(dead: str) -> None:
    times = iter(range(9))
    script = Script(lambda _actor, unit: vanish() if unit and unit.number == 3 and next(times) < 4 else 0, dead=dead)
    if dead:
        assert [unit for _, unit in script.run(1)] == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5], "it is begun anew each time"
        assert sum(call.unit is None for call in script.calls) == 5
    else:
        with refused(WorkError, "unit 3"):
            script.run(1)


def test_an_actor_that_has_lost_its_place_waits_for_another_as_long_as_it_takes() -> None:
    times = iter(range(40))
    reasons = itertools.cycle(["RpcError: failed to connect to all addresses", "IOError: The actor is restarting."])

    def answer(actor: str, unit: Unit | None) -> int:
        if actor == "0" and (unit is not None or 0 < next(times) < 20):
            words = next(reasons)
            raise ActorUnavailableError(words, b"0" * 16)
        return 0

    script = Script(answer, dead="0")
    assert sorted({unit for actor, unit in script.run(2) if actor == "1"}) == [*range(6)]
    assert sum(call.actor == "0" and call.unit is None for call in script.calls) > 5


def test_a_node_that_does_not_see_the_inputs_ends_the_work() -> None:
    def begin(_actor: str, unit: Unit | None) -> int:
        raise RayTaskError("begin", "a traceback", UsageError("node worker: data d: nothing is there"))

    with refused(UsageError, "node worker"):
        Script(begin).run(2)
    with refused(WorkError, "actor"):
        Script(lambda _actor, _unit: vanish()).run(1)


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--actors", 2], "--actors"),
        (["--engine", "ray", "--actors", 0], "--actors"),
        (["--engine", "ray", "--actor_gpus", 1.5], "--actor_gpus"),
        (["--engine", "ray", "--ray_address", "127.0.0.1:1"], "--ray_address"),
        (["--engine", "ray", "--ray_address", "nonsense"], "--ray_address"),
    ],
)
def test_what_the_verb_refuses(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, flags: list[object], field: str
) -> None:
    with refused(UsageError, field):
        call("encode", tiny_vae_folder, image_folder, tmp_path / "s", "--resolution", 32, *flags)
    assert not (tmp_path / "s").exists()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused(UsageError, "ray"), ray_engine.ray_engine(Inputs("vae", "data"), None, None, None, None, None):
        raise AssertionError
