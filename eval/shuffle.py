"""The distance of an order by windows of shards (`LatentLoader`'s `window`) from a uniform one.

    python -m eval.shuffle                                       # a table of docs/using_latents.md; in seconds
    python -m eval.shuffle --shards 15259 --rows 65536 --windows 32 --epochs 1

A window changes how often two rows of a batch come from one shard. Where shards are alike, as those of a shuffled
source, that is all that it changes. Where they differ, as those of a folder that is sorted by class, it makes the mean
of a batch noisier: the table has the variance of a value that is the same for all rows of a shard, the worst case
(Kish 1965, "Survey Sampling", section 5.4: the design effect), relative to that under a uniform order.

The measured share is of the loader's own order. Beside the closed form it has the ends of an epoch, whose segments are
longer. `buffer` is the other way to shuffle, WebDataset's: rows of shards in turn pass through a buffer of as many rows
as the window's shards have, and each leaves it at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser
from ldm_vae.latent_store.read.windows import WindowedOrder

Integers = npt.NDArray[np.int64]


def same_shard(rows: int, window: int, distance: float) -> float:
    """Probability that two rows come from one shard, so many places apart in the order, away from an epoch's ends.

    Segments have as many rows as a shard and a part of each of W shards. Segments q apart have W - q of these in
    common, and two places lie q or q + 1 segments apart.
    """
    if distance <= 0:
        raise UsageError(f"distance: expected more than 0 places, got {distance}")

    def segments_apart(q: int) -> float:
        return (rows / window - 1) / (rows - 1) if q == 0 else max(0, window - q) / window**2

    q, rest = divmod(distance / rows, 1)
    return (1 - rest) * segments_apart(int(q)) + rest * segments_apart(int(q) + 1)


def same_shard_of_a_batch(rows: int, window: int, batch: int, lanes: int = 1) -> float:
    """Probability that two rows of a global batch come from one shard; a lane's part of it has at most `rows`."""
    each = batch // lanes
    # linear in the distance up to `rows`, and the mean distance of two places of `each` is a third of it
    return 0.0 if each < 2 else (each - 1) / (batch - 1) * same_shard(rows, window, (each + 1) / 3)


def variance_of_mean(same: float, shards: int, batch: int) -> float:
    """Variance of a batch's mean of a value that is the same for all rows of a shard, and has variance 1 among
    shards: two rows have the value in common, or two of its values, which are drawn without replacement."""
    correlation = same - (1 - same) / (shards - 1)
    return (1 + (batch - 1) * correlation) / batch


def shares(shard_of: Integers, batch: int) -> npt.NDArray[np.float64]:
    """Of each batch of an order, given by the shards of its rows: the share of its pairs that are of one shard."""
    found = []
    for first in range(0, len(shard_of) - batch + 1, batch):
        counts = np.bincount(shard_of[first : first + batch])
        found.append(float((counts * (counts - 1)).sum()) / (batch * (batch - 1)))
    return np.array(found)


def windowed(shards: int, rows: int, window: int, lanes: int, batch: int, epoch: int) -> Integers:
    """The shard of each row of an epoch, in the loader's order."""
    order = WindowedOrder(0, np.full(shards, rows), window, lanes, batch)
    first = epoch * order.count
    # lanes are parts of batches that begin at multiples of `batch`
    skip = -first % batch
    return np.array([order.task(place).index for place in range(first + skip, first + order.count)]) // rows


def buffered(shards: int, rows: int, size: int, seed: int) -> Integers:
    """The shard of each row that leaves a buffer of `size` rows, once it is full."""

    def left() -> Iterator[int]:
        draw = np.random.default_rng(seed)
        arriving = np.repeat(draw.permutation(shards), rows)
        held = arriving[:size].copy()
        for row, place in zip(arriving[size:], draw.integers(0, size, len(arriving) - size), strict=True):
            yield held[place]
            held[place] = row

    return np.fromiter(left(), dtype=np.int64)


def table(options: argparse.Namespace) -> list[str]:
    """One row for each window."""
    shards, rows, batch, lanes = options.shards, options.rows, options.batch, options.lanes
    uniform = (rows - 1) / (shards * rows - 1)
    lines = [
        "| shards in the window | pairs of one shard, measured | closed form | buffer, measured | "
        "variance of a batch's mean, of uniform |",
        "|---|---|---|---|---|",
    ]
    for window in options.windows:
        found = [shares(windowed(shards, rows, window, lanes, batch, e), batch) for e in range(options.epochs)]
        measured = float(np.concatenate(found).mean())
        closed = same_shard_of_a_batch(rows, window, batch, lanes) if window < shards else uniform
        # the buffer is looked at while it is full, and has no lanes
        buffer = (
            ""
            if 4 * window > shards or lanes > 1
            else f"{shares(buffered(shards, rows, window * rows, 0), batch).mean():.2%}"
        )
        noise = variance_of_mean(measured, shards, batch) / variance_of_mean(uniform, shards, batch)
        lines.append(f"| {window:,} | {measured:.2%} | {closed:.2%} | {buffer} | {noise:.1f} |")
    return lines


def main() -> None:
    options = arguments()
    count = options.shards * options.rows
    print(
        f"{count:,} rows in {options.shards:,} shards of {options.rows:,}; global batches of {options.batch:,} in "
        f"{options.lanes} lanes. Uniform: {(options.rows - 1) / (count - 1):.2%} of pairs.\n"
    )
    print("\n".join(table(options)))


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.shuffle", description=__doc__)
    parser.add_argument("--shards", type=int, default=488, help="of the store (488)")
    parser.add_argument("--rows", type=int, default=2048, help="of a shard (2,048)")
    parser.add_argument("--batch", type=int, default=1000, help="rows of a global batch (1,000)")
    parser.add_argument("--lanes", type=int, default=1, help="parts of it that read shards of their own (1)")
    parser.add_argument("--epochs", type=int, default=2, help="that are measured (2)")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64, 488], help="(1 4 16 64 488)")
    found = parser.parse_args()
    for name, least in (("shards", 2), ("rows", 2), ("batch", 2), ("lanes", 1), ("epochs", 1)):
        if getattr(found, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(found, name)}")
    if min(found.windows) < 1:
        raise UsageError(f"windows: expected at least 1, got {min(found.windows)}")
    if found.batch % found.lanes or found.batch > found.lanes * found.rows:
        most = found.lanes * found.rows
        raise UsageError(f"batch: expected a multiple of {found.lanes} lanes, at most {most:,}, got {found.batch:,}")
    return found


if __name__ == "__main__":
    run_program(main)
