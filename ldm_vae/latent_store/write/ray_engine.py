"""The engine on a Ray cluster: the driver plans, owns and finishes a store, actors encode its units.

An actor has one unit at a time, so what is under way is bounded by their number. A unit whose actor is lost goes to
another one; Ray starts the actor anew, on a node that is there or on one that an autoscaler adds. A unit is done when
its record is published, whoever says what: the driver merges records, as a launch does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm_vae import __version__
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.core.validation import first_line
from ldm_vae.latent_store.format.work_units import Unit
from ldm_vae.latent_store.write.processes import Job
from ldm_vae.latent_store.write.ray_actor import Actor, Inputs, Told

TRIES = 3  # of a unit, and of an actor to begin
# of an actor whose node is gone, in Ray's words: before the cluster has noticed, and until there is another place
UNREACHED = ("failed to connect", "actor is restarting")
SILENCE = 30.0  # seconds without an actor after which that is said
CONNECT_SECONDS = 10.0
GPU_CORES = 8  # decoding processes beside a GPU at most, as in a launch


@contextlib.contextmanager
def ray_engine(
    inputs: Inputs,
    address: str | None,
    actors: int | None,
    actor_gpus: float | None,
    num_workers: int | None,
    threads: int | None,
) -> Iterator[RayEngine]:
    """An engine on the cluster at `address`, while the block runs.

    Args:
        address: HOST:PORT, `auto` or `local`; None is RAY_ADDRESS, else the cluster that this machine is of, else one
            that is started here.
        actors: at most so many at a time; None is what the cluster has room for now.
        actor_gpus: of each actor, a share of one as well; None is 1 where the cluster has any.
        num_workers, threads: of each actor, as of a process; None: on a CPU 0 and 1, beside a GPU its share of the
            cores and 2.

    Raises:
        UsageError: Ray is not installed, or no cluster is at the address.
    """
    ray = _connected(address)
    try:
        there = ray.cluster_resources()
        cores, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
        each = actor_gpus if actor_gpus is not None else min(gpus, 1.0)
        if num_workers is None:
            num_workers = min(GPU_CORES, max(1, int(cores * each / gpus) if gpus else 1)) if each else 0
        if threads is None:
            threads = 2 if each else 1
        # a GPU's encoding threads only wait for it
        cpus = max(1, num_workers + (0 if each else threads))
        room = int(min(cores / cpus, gpus / each if each else cores))
        engine = RayEngine(ray, inputs, actors or max(1, room), cpus, each, num_workers, threads)
        nodes = sum(node["Alive"] for node in ray.nodes())
        print(
            f"Ray at {ray.get_runtime_context().gcs_address}: {nodes} node(s) with {cores:g} CPUs and {gpus:g} GPUs, "
            f"which have room for {room} of {engine.actors} actor(s) of {engine.demand}",
            file=sys.stderr,
        )
        yield engine
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class RayEngine:
    """An engine (`processes.Engine`): actors of so many CPUs and GPUs, of which those without a place wait for one."""

    ray: Any
    inputs: Inputs
    actors: int
    cpus: int
    gpus: float
    num_workers: int
    threads: int

    @property
    def demand(self) -> str:
        """Needs of an actor, in words."""
        return f"{self.cpus} CPU(s) and {self.gpus:g} GPU(s)"

    def __call__(self, job: Job, units: Sequence[Unit]) -> None:
        """Have the units encoded.

        Raises:
            UsageError: a node does not see VAE, DATA or OUT as the driver does.
            WorkError: a unit failed three times.
        """
        if not units:
            return
        job = replace(job, num_workers=self.num_workers, threads=self.threads)
        kind = self.ray.remote(Actor).options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1)
        actors = [kind.remote(job, self.inputs, __version__) for _ in range(min(self.actors, len(units)))]
        try:
            with Progress(total=sum(len(unit.indices) for unit in units), desc="encode", unit="img") as bar:
                self._deal(actors, units, bar)
        finally:
            for actor in actors:
                self.ray.kill(actor)

    def _deal(self, actors: Sequence[Any], units: Sequence[Unit], bar: Progress) -> None:
        ray, waiting, left, bad = self.ray, deque(units), len(units), 0
        # each actor's question: to begin (None), or a unit. One without a place has not begun, and is given nothing
        asked: dict[Any, tuple[Any, Unit | None]] = {actor.begin.remote(): (actor, None) for actor in actors}
        at_work: dict[Any, Told] = {}
        failed: defaultdict[Any, list[str]] = defaultdict(list)  # nodes where it failed, by unit or actor
        while left:
            answers, _ = ray.wait([*asked], timeout=SILENCE)
            if not answers and not at_work:
                free = " and ".join(f"{ray.available_resources().get(name, 0):g} {name}(s)" for name in ("CPU", "GPU"))
                bar.say(
                    f"note: no actor is at work yet: they load VAE and DATA, or wait for {self.demand}; free: {free}"
                )
            for answer in answers:
                actor, unit = asked.pop(answer)
                try:
                    told: Told = ray.get(answer)
                except ray.exceptions.RayTaskError as error:
                    if unit is None:  # what a node does not see it must not encode as images that cannot be read
                        raise error.cause from None
                    failed[unit.number].append(at_work[actor].node_id)
                    self._check(failed[unit.number], unit, str(error.cause))
                    waiting.append(unit)  # after the others, and so on another node, where there is one
                except ray.exceptions.RayActorError as error:
                    # that an actor has no place again is said every few seconds, and no failure
                    if unit is not None or not any(words in str(error) for words in UNREACHED):
                        gone, key = at_work.pop(actor, None), actor if unit is None else unit.number
                        failed[key].append("" if gone is None else gone.node_id)
                        self._check(
                            failed[key], unit, f"its process ended: {str(error).strip().splitlines()[-1].strip()}"
                        )
                        waiting.extendleft([] if unit is None else [unit])
                        bar.say(f"note: lost {'an actor' if gone is None else gone.node}; Ray starts its actor again")
                    asked[actor.begin.remote()] = actor, None
                    continue
                else:
                    for warning in told.warnings:
                        bar.say(f"node {told.node}: {warning}")
                    at_work[actor] = told
                    if unit is not None:
                        left, bad = left - 1, bad + told.bad
                        bar.update(len(unit.indices))
                if waiting:
                    unit = waiting.popleft()
                    asked[actor.encode.remote(unit)] = actor, unit
                else:  # a unit that is lost from here on is done by its own actor, in this one's place if need be
                    del at_work[actor]
                    ray.kill(actor)
                nodes = len({one.node_id for one in at_work.values()})
                bar.set_postfix_str(f"{len(at_work)} actors on {nodes} nodes, quarantined {bad}", refresh=False)

    def _check(self, nodes: Sequence[str], unit: Unit | None, reason: str) -> None:
        """Raise WorkError if something failed three times, not counting nodes that are gone."""
        gone = {node["NodeID"] for node in self.ray.nodes() if not node["Alive"]}
        if sum(node not in gone for node in nodes) >= TRIES:
            what = "an actor" if unit is None else f"unit {unit.number} (from image {unit.indices[0]:,} of DATA on)"
            raise WorkError(f"{what} failed {TRIES} times: {reason}; what was finished is kept")


def _connected(address: str | None) -> Any:
    """The module `ray`, connected. Raises UsageError."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray: needs Ray: pip install 'ldm-vae[ray]'") from error
    address = address or os.environ.get("RAY_ADDRESS") or None
    field = f"--ray_address {address}: expected HOST:PORT of a running cluster, auto or local"
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    # Ray itself looks for minutes, and ends the program with a signal then
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise UsageError(f"{field}, and nothing answers there: {error}") from error
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "auto", **quiet)
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
        if address is not None:
            raise UsageError(f"{field}; Ray says: {first_line(error)}") from error
        print("note: this machine is of no Ray cluster; one is started on it for this call", file=sys.stderr)
        ray.init(address="local", **quiet)
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the program without a word
    return ray
