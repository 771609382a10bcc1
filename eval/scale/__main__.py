"""10^9 images on many machines: what they weigh, and what failures cost. The tables of docs/scale.md.

    python -m eval.scale                                        # in seconds, on any machine
    python -m eval.scale --nodes 512 --mtbf_hours 20000         # with numbers of your own

Every figure is arithmetic on the arguments, but for the time that failures cost: that is simulated, node by node and
request by request with a seed, and stands beside its closed form. Nodes fail independently of each other, each as a
Poisson process.

- Training stops when any node fails, starts again and repeats what was done since the last checkpoint (Daly 2006,
  "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 20; Young 1974 for the interval).
- Encoding goes on: a failure costs its own node a restart and the units that were under way there.
- Spot nodes are preempted far more often than nodes fail, and are away until there is another one (exponential). What
  waits is the whole training, or the encoding's own units; a node that is away costs nothing.
- Requests to an object store have a time to first byte, fail and are made again (`transfers.py`).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import numpy as np

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser
from ldm_vae.latent_store.read.prefetch import THREADS

from .failures import Run, best_interval, expected_failures, expected_wall, share_lost, simulate
from .transfers import (
    Transfer,
    expected_pool,
    expected_transfer,
    given_up,
    simulate_pool,
    simulate_transfer,
)

HOUR = 3600.0
REPETITIONS = 300  # of a simulated run
FAILURES = 2_000  # of a node that encodes: so long is it watched
TRANSFERS = 2_000  # of each object
IMAGE_BYTES = 1e5
PART_BYTES = 50 * 2**20  # of an upload in parts: s3fs's
OTHER_PUTS = 6  # of a shard: the upload's begin and end, two tables, the unit's record, its share of everything else


# --- tables -----------------------------------------------------------------------------------------------------------


def weights(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Table of the store's size for all images, and of the traffic over the network."""
    row = _row(options)
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


def _row(options: argparse.Namespace) -> int:
    """Bytes of an image's latents: mean and logvar, f8, 4 channels, fp16."""
    side: int = options.resolution // 8
    return 2 * 4 * side * side * 2


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


def spot(options: argparse.Namespace) -> list[str]:
    """Nodes that are preempted: a month of training on several, and the encoding of one; what is paid is the time in
    which the nodes are there."""
    lines = [
        "| work | nodes | more time, simulated | closed form | more to pay, simulated | closed form |",
        "|---|---|---|---|---|---|",
    ]
    mtbf = options.preempt_hours * HOUR
    common = {"restart": options.restart_s, "node_mtbf": mtbf, "away": options.away_s}
    month = Run(work=30 * 24 * HOUR, interval=1.0, checkpoint=options.checkpoint_s, **common)
    rows = []
    for nodes in (1, 8, options.nodes):
        young = best_interval(replace(month, nodes=nodes))
        run = replace(month, nodes=nodes, interval=young)
        rows.append((f"training, {young / 60:.0f} min between checkpoints", run, REPETITIONS // 10))
    for size in (2048, options.shard_size):
        node = Run(work=FAILURES * mtbf, interval=size / options.encode_rate, checkpoint=0.0, **common)
        rows.append((f"encoding, units of {size:,}", node, 1))
    for name, run, repetitions in rows:
        outcomes = [simulate(run, seed) for seed in range(repetitions)]
        paid = [outcome.wall - outcome.away for outcome in outcomes]
        shares = [
            share_lost(run, times)
            for times in (
                [outcome.wall for outcome in outcomes], [expected_wall(run)],
                paid, [expected_failures(run) / run.rate],
            )
        ]  # fmt: skip
        lines.append(f"| {name} | {run.nodes} | {' | '.join(f'{share:.2%}' for share in shares)} |")
    return lines


def requests(options: argparse.Namespace) -> list[str]:
    """Objects from a store: by one connection, by the loader's, and the connections that a node needs to read as many
    bytes as it encodes."""
    row = _row(options)
    needed = options.gpus * options.encode_rate * IMAGE_BYTES
    lines = [
        "| object | requests that fail | seconds of each, simulated | closed form | "
        f"MB/s of {THREADS} connections, simulated | closed form | connections for {needed / 1e9:.2g} GB/s | "
        "given up, of 10^9 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, size in (
        ("an image of 100 KB", IMAGE_BYTES),
        ("a shard of 2,048 latents", 2048 * row),
        (f"a shard of {options.shard_size:,} latents", options.shard_size * row),
    ):
        for failing in (0.0, options.request_failing, 5 * options.request_failing):
            transfer = Transfer(size, options.first_byte_s, options.connection_mb_s * 1e6, failing)
            draw = np.random.default_rng(0)
            simulated = float(np.mean([simulate_transfer(transfer, draw)[0] for _ in range(TRANSFERS)]))
            seconds = expected_transfer(transfer)
            pooled = [simulate_pool(transfer, THREADS, TRANSFERS, 0)[0], expected_pool(transfer, THREADS, TRANSFERS)]
            rates = " | ".join(f"{TRANSFERS * size / wall / 1e6:.3g}" for wall in pooled)
            lines.append(
                f"| {name} | {failing:.1%} | {simulated:.3g} | {seconds:.3g} | {rates} | "
                f"{needed * seconds / size:.3g} | {1e9 * given_up(transfer):.2g} |"
            )
    return lines


def ways(options: argparse.Namespace) -> list[str]:
    """Time and cost of a million images by each way to launch `ldm-vae encode`."""
    work = 1e6 / options.encode_rate / HOUR  # GPU-hours
    size = options.shard_size
    stays = Run(work=1.0, interval=size / options.encode_rate, checkpoint=0.0, restart=options.restart_s,
                node_mtbf=options.mtbf_hours * HOUR)  # fmt: skip
    goes = replace(stays, node_mtbf=options.preempt_hours * HOUR, away=options.away_s)
    transfer = Transfer(
        size * _row(options), options.first_byte_s, options.connection_mb_s * 1e6, options.request_failing
    )
    to_store = expected_transfer(transfer) / (size / options.encode_rate)
    lines = [
        "| way | GPUs | minutes per 10^6 images | GPU-hours | dollars |",
        "|---|---|---|---|---|",
    ]
    on_demand, cheaper = options.gpu_hour, options.gpu_hour * options.spot_share
    several = options.parts * options.gpus
    for name, gpus, run, price in (
        ("one launch", options.gpus, stays, on_demand),
        (f"`--job_part N/{options.parts}`", several, stays, on_demand),
        ("`--engine ray`, nodes that stay", several, stays, on_demand),
        ("`--engine ray`, spot nodes", several, goes, cheaper),
    ):
        wall, paid = expected_wall(run) / run.work, expected_failures(run) / run.rate / run.work
        lines.append(
            f"| {name} | {gpus} | {60 * work * wall / gpus:.3g} | {work * paid:.3g} | {work * paid * price:.3g} |"
        )
    puts = 1e6 / size * (math.ceil(transfer.bytes / PART_BYTES) + OTHER_PUTS)
    requests_cost = puts * options.put_price / 1e6
    month = 1e6 * _row(options) / 1e9 * options.month_price
    lines.append(
        f"| each of them to `s3://` |  | at most {to_store:.1%} more | at most {to_store:.1%} more | "
        f"{requests_cost:.2g} of {puts:,.0f} requests, {month:.2g} a month |"
    )
    return lines


def main() -> None:
    options = arguments()
    print(f"A million images, in a run of many, by each way (units of {options.shard_size:,}).\n")
    print("\n".join([*ways(options), ""]))
    print("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in weights(options))]))
    hours = options.mtbf_hours / options.nodes
    print(f"\nTraining for 30 days on {options.nodes} nodes: one fails every {hours:.0f} hours.\n")
    print("\n".join(training(options)))
    print(f"\nEncoding {options.images:,} images on the same nodes.\n")
    print("\n".join(encoding(options)))
    print(f"\nSpot nodes, each preempted every {options.preempt_hours:g} h, another after {options.away_s:g} s.\n")
    print("\n".join(spot(options)))
    print(
        f"\nRequests to an object store: {options.first_byte_s:g} s to the first byte, "
        f"{options.connection_mb_s:g} MB/s.\n"
    )
    print("\n".join(requests(options)))


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
        "parts": (16, "machines of a job array, or of a Ray cluster"),
        "preempt_hours": (24.0, "between two preemptions of a spot machine (assumed)"),
        "away_s": (600.0, "seconds until there is another machine (assumed)"),
        "gpu_hour": (2.0, "dollars of an hour of a GPU (assumed)"),
        "spot_share": (0.5, "of that price for a spot machine (assumed)"),
        "first_byte_s": (0.15, "seconds to an object's first byte (S3's performance guide: 0.1 to 0.2)"),
        "connection_mb_s": (85.0, "MB a second of a connection (the same: 85 to 90)"),
        "request_failing": (0.01, "share of requests that fail (assumed)"),
        "put_price": (5.0, "dollars of 10^6 requests that write (S3's list price)"),
        "month_price": (0.023, "dollars of a GB and month (S3's list price)"),
    }
    for name, (value, text) in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value:,})")
    found = parser.parse_args()
    for name in defaults:
        if not getattr(found, name) > 0:
            raise UsageError(f"{name}: expected more than 0, got {getattr(found, name)}")
    for name, most in (("spot_share", 1.0), ("request_failing", 0.2)):  # the table has five times as many failing
        if getattr(found, name) > most:
            raise UsageError(f"{name}: expected at most {most:g}, got {getattr(found, name):g}")
    return found


if __name__ == "__main__":
    run_program(main)
