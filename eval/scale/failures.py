"""Runs on nodes that fail: simulated, and in closed form.

Nodes fail independently of each other, each as a Poisson process. Training stops when any node fails, starts again and
repeats what was done since the last checkpoint (Daly 2006, "A higher order estimate of the optimum checkpoint interval
for restart dumps", eq. 20; Young 1974 for the interval).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """Seconds of a run that any failure of its nodes stops: work without failures, between checkpoints, of writing one,
    from a failure (or the new node's arrival) until work goes on, on average between two failures of a node, and on
    average until a node that failed has another in its place."""

    work: float
    interval: float
    checkpoint: float
    restart: float
    node_mtbf: float
    nodes: int = 1
    away: float = 0.0

    @property
    def rate(self) -> float:
        """Failures a second of all nodes."""
        return self.nodes / self.node_mtbf


@dataclass(frozen=True)
class Outcome:
    """Seconds from beginning to end, how many failures, seconds of work that was done in vain, and seconds without a
    node."""

    wall: float
    failures: int
    lost: float
    away: float = 0.0


def simulate(run: Run, seed: int) -> Outcome:
    """One run, node by node: a node that fails is replaced by a new one."""
    draw = np.random.default_rng(seed)
    failing = list(draw.exponential(run.node_mtbf, run.nodes))  # when each node fails next
    heapq.heapify(failing)
    pieces = math.ceil(run.work / run.interval)
    clock, lost, away, done, failures = 0.0, 0.0, 0.0, 0, 0

    def fail() -> float:
        """The time at which all nodes are there again."""
        nonlocal failures, away
        failures += 1
        when = failing[0]
        gone = draw.exponential(run.away) if run.away else 0.0
        away += gone
        heapq.heapreplace(failing, when + gone + draw.exponential(run.node_mtbf))
        # a node that fails while the others wait is replaced in the same time
        while failing[0] < when + gone:
            heapq.heapreplace(failing, when + gone + draw.exponential(run.node_mtbf))
        return when + gone

    step = run.interval + run.checkpoint
    while done < pieces:
        whole = max(0, min(pieces - 1 - done, int((failing[0] - clock) // step)))  # that nothing interrupts
        clock, done = clock + whole * step, done + whole
        piece = run.interval if done < pieces - 1 else run.work - (pieces - 1) * run.interval
        if failing[0] >= clock + piece + run.checkpoint:
            clock, done = clock + piece + run.checkpoint, done + 1
            continue
        lost += failing[0] - clock
        clock = fail()
        while failing[0] < clock + run.restart:  # another one while the run is started again
            clock = fail()
        clock += run.restart
    return Outcome(clock, failures, lost, away)


def expected_wall(run: Run) -> float:
    """Seconds from beginning to end, on average: Daly 2006, eq. 20, in whose terms there are `expected_failures`, each
    of which ends a time that is 1 / rate on average; with the time until the node's replacement."""
    return expected_failures(run) * (1 / run.rate + run.away)


def expected_failures(run: Run) -> float:
    """Failures of all nodes, on average, those while the run is started again among them."""
    each = math.exp(run.rate * run.restart) * math.expm1(run.rate * (run.interval + run.checkpoint))
    return each * (run.work / run.interval)


def best_interval(run: Run) -> float:
    """Young's interval: what failures and checkpoints cost together is smallest there, where both are rare."""
    return math.sqrt(2 * run.checkpoint / run.rate)


def share_lost(run: Run, walls: Sequence[float]) -> float:
    """Time beyond the work, over the work."""
    return float(np.mean(walls)) / run.work - 1
