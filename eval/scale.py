"""10^9 images on many machines: what they weigh, and what failures cost. The tables of docs/scale.md.

    python -m eval.scale                                        # in seconds, on any machine
    python -m eval.scale --nodes 512 --mtbf_hours 20000         # with numbers of your own

Every figure is arithmetic on the arguments, but for the share of time that failures cost: that is simulated, node by
node with a seed, and stands beside its closed form. Nodes fail independently of each other, each as a Poisson process.

- Training stops when any node fails, starts again and repeats what was done since the last checkpoint (Daly 2006,
  "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 20; Young 1974 for the interval).
- Encoding goes on: a failure costs its own node a restart and the units that were under way there.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser

HOUR = 3600.0
REPETITIONS = 300  # of a simulated run
FAILURES = 2_000  # of a node that encodes: so long is it watched


# --- failures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Seconds of a run that any failure of its nodes stops: work without failures, between checkpoints, of writing one,
    from a failure until work goes on, and on average between two failures of a node."""

    work: float
    interval: float
    checkpoint: float
    restart: float
    node_mtbf: float
    nodes: int = 1

    @property
    def rate(self) -> float:
        """Failures a second of all nodes."""
        return self.nodes / self.node_mtbf


@dataclass(frozen=True)
class Outcome:
    """Seconds from beginning to end, how many failures, and seconds of work that was done in vain."""

    wall: float
    failures: int
    lost: float


def simulate(run: Run, seed: int) -> Outcome:
    """One run, node by node: a node that fails is replaced by a new one."""
    draw = np.random.default_rng(seed)
    failing = list(draw.exponential(run.node_mtbf, run.nodes))  # when each node fails next
    heapq.heapify(failing)
    pieces = math.ceil(run.work / run.interval)
    clock, lost, done, failures = 0.0, 0.0, 0, 0

    def fail() -> float:
        nonlocal failures
        failures += 1
        when = failing[0]
        heapq.heapreplace(failing, when + draw.exponential(run.node_mtbf))
        return when

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
    return Outcome(clock, failures, lost)


def expected_wall(run: Run) -> float:
    """Seconds from beginning to end, on average: Daly 2006, eq. 20."""
    rate = run.rate
    return (
        math.exp(rate * run.restart)
        * math.expm1(rate * (run.interval + run.checkpoint))
        / rate
        * (run.work / run.interval)
    )


def best_interval(run: Run) -> float:
    """Young's interval: what failures and checkpoints cost together is smallest there, where both are rare."""
    return math.sqrt(2 * run.checkpoint / run.rate)


def share_lost(run: Run, walls: Sequence[float]) -> float:
    """Time beyond the work, over the work."""
    return float(np.mean(walls)) / run.work - 1


# --- tables -----------------------------------------------------------------------------------------------------------


def weights(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Table of the store's size for all images, and of the traffic over the network."""
    side = options.resolution // 8
    row = 2 * 4 * side * side * 2  # mean and logvar, 4 channels, fp16
    found = [
        ("latents of an image (f8, 4 channels, mean and logvar, fp16)", f"{row / 1024:.0f} KiB"),
        ("all of them", f"{options.images * row / 1e12:.1f} TB"),
    ]
    for size in (2048, options.shard_size):
        shards = -(-options.images // size)
        found += [
            (f"shards of {size:,}", f"{shards:,} of {size * row / 1e6:.0f} MB, {3 * shards:,} files"),
            (
                f"  their lines in manifest.json, {options.shard_line} bytes each",
                f"{shards * options.shard_line / 1e6:.0f} MB",
            ),
        ]
    processes = options.nodes * options.gpus
    rate = processes * options.encode_rate
    found += [
        (f"images a second on {options.nodes} nodes of {options.gpus}", f"{rate:,.0f}"),
        ("  hours for all of them, nothing failing", f"{options.images / rate / HOUR:.1f}"),
        ("  read, files of 100 KB, of a node", f"{rate / options.nodes * 1e5 / 1e9:.2f} GB/s"),
        ("  written, of a node", f"{rate / options.nodes * row / 1e6:.0f} MB/s"),
        ("gradients of a training step (84 M parameters, fp32), ring, a process", f"{2 * 4 * 84e6 / 1e9:.2f} GB"),
        ("a checkpoint (weights, average, two moments)", f"{4 * 4 * 84e6 / 1e9:.1f} GB"),
    ]
    return found


def training(options: argparse.Namespace) -> list[str]:
    """A month of training against the interval between checkpoints."""
    run = Run(
        work=30 * 24 * HOUR, interval=1.0, checkpoint=options.checkpoint_s, restart=options.restart_s,
        node_mtbf=options.mtbf_hours * HOUR, nodes=options.nodes,
    )  # fmt: skip
    young = best_interval(run)
    lines = [
        "| minutes between checkpoints | failures | lost per failure, minutes | time lost, simulated | closed form |"
    ]
    lines.append("|---|---|---|---|---|")
    for factor in (0.25, 1.0, 4.0, 16.0):
        chosen = replace(run, interval=young * factor)
        outcomes = [simulate(chosen, seed) for seed in range(REPETITIONS)]
        failures = float(np.mean([outcome.failures for outcome in outcomes]))
        lost = sum(outcome.lost for outcome in outcomes) / max(1, sum(outcome.failures for outcome in outcomes))
        simulated = share_lost(chosen, [outcome.wall for outcome in outcomes])
        name = f"{chosen.interval / 60:.1f}" + (" (Young's)" if factor == 1.0 else "")
        lines.append(
            f"| {name} | {failures:.1f} | {lost / 60:.1f} | {simulated:.2%} | "
            f"{share_lost(chosen, [expected_wall(chosen)]):.2%} |"
        )
    return lines


def encoding(options: argparse.Namespace) -> list[str]:
    """All images encoded, against the size of a unit: each process of a node that failed repeats its own."""
    hours = options.images / (options.nodes * options.gpus * options.encode_rate) / HOUR
    failures = options.nodes * hours / options.mtbf_hours
    lines = [
        "| images of a unit | seconds of it | failures | encoded twice for each | time lost, simulated | closed form |",
        "|---|---|---|---|---|---|",
    ]
    for size in (2048, options.shard_size):
        node = Run(
            work=FAILURES * options.mtbf_hours * HOUR, interval=size / options.encode_rate, checkpoint=0.0,
            restart=options.restart_s, node_mtbf=options.mtbf_hours * HOUR,
        )  # fmt: skip
        found = simulate(node, 0)
        twice = found.lost / found.failures * options.encode_rate * options.gpus
        shares = [f"{share_lost(node, [wall]):.5%}" for wall in (found.wall, expected_wall(node))]
        lines.append(f"| {size:,} | {node.interval:.0f} | {failures:.2g} | {twice:,.0f} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    options = arguments()
    print("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in weights(options))]))
    hours = options.mtbf_hours / options.nodes
    print(f"\nTraining for 30 days on {options.nodes} nodes: one fails every {hours:.0f} hours.\n")
    print("\n".join(training(options)))
    print(f"\nEncoding {options.images:,} images on the same nodes.\n")
    print("\n".join(encoding(options)))


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.scale", description=__doc__)
    defaults = {
        "images": (1_000_000_000, "to encode"),
        "resolution": (256, "of their crops"),
        "nodes": (64, "machines"),
        "gpus": (8, "of a machine, a process each"),
        "encode_rate": (200.0, "images a second of a GPU"),
        "shard_size": (65_536, "beside 2,048, the default of `ldm-vae encode`"),
        "shard_line": (475, "bytes of a shard in manifest.json"),
        "mtbf_hours": (6_300.0, "between two failures of a machine (16,384 GPUs failed 419 times in 54 days: Llama 3)"),
        "checkpoint_s": (10.0, "seconds that a checkpoint takes"),
        "restart_s": (300.0, "seconds from a failure until work goes on"),
    }
    for name, (value, text) in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value:,})")
    found = parser.parse_args()
    for name in defaults:
        if not getattr(found, name) > 0:
            raise UsageError(f"{name}: expected more than 0, got {getattr(found, name)}")
    return found


if __name__ == "__main__":
    run_program(main)
