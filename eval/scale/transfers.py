"""Transfers to and from an object store: time to first byte, requests that fail, and the waits of our own retries.

A request takes the time to its first byte, drawn from a lognormal distribution (of the given mean, sigma 0.5), and that
of its bytes at the rate of one connection. With probability `failing` it ends at a place that is uniform in its bytes,
and is made again after the wait of `fsspec_files` (twice as long each time, jittered), ATTEMPTS times at most. Every
figure has a closed form beside its simulation (`eval.scale`).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ldm_vae.core.fsspec_files import ATTEMPTS, FIRST_WAIT, LONGEST_WAIT

SIGMA = 0.5


@dataclass(frozen=True)
class Transfer:
    """One object's way: bytes, mean seconds to the first of them, bytes a second of a connection, and the probability
    that a request fails."""

    bytes: float
    first_byte: float
    bandwidth: float
    failing: float

    @property
    def whole(self) -> float:
        """Seconds of a request that succeeds, on average."""
        return self.first_byte + self.bytes / self.bandwidth


def wait(failed: int) -> float:
    """Seconds before the next attempt after so many failed ones, without jitter."""
    return min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT)


def simulate_transfer(transfer: Transfer, draw: np.random.Generator) -> tuple[float, bool]:
    """Seconds of one transfer, and whether it was given up."""
    seconds = 0.0
    for attempt in range(1, ATTEMPTS + 1):
        seconds += transfer.first_byte * draw.lognormal(-(SIGMA**2) / 2, SIGMA)
        if draw.random() >= transfer.failing:
            return seconds + transfer.bytes / transfer.bandwidth, False
        seconds += draw.random() * transfer.bytes / transfer.bandwidth
        if attempt < ATTEMPTS:
            seconds += wait(attempt) * draw.uniform(0.5, 1.0)
    return seconds, True


def expected_transfer(transfer: Transfer) -> float:
    """Seconds of one transfer, on average, those that are given up among them: attempt j is made if j - 1 failed."""
    fails = transfer.failing
    cut = transfer.first_byte + transfer.bytes / transfer.bandwidth / 2
    attempts = sum(fails**failed for failed in range(ATTEMPTS))
    waits = sum(fails**failed * 0.75 * wait(failed) for failed in range(1, ATTEMPTS))
    return attempts * ((1 - fails) * transfer.whole + fails * cut) + waits


def given_up(transfer: Transfer) -> float:
    """Probability that all attempts of a transfer fail."""
    return transfer.failing**ATTEMPTS


def simulate_pool(transfer: Transfer, connections: int, objects: int, seed: int) -> tuple[float, float]:
    """Seconds until so many objects have come over several connections, each of which takes the next one when it is
    free; and the longest transfer, by which the end may be later than the closed form, in which none is ever idle."""
    draw = np.random.default_rng(seed)
    free = [0.0] * connections
    longest = 0.0
    for _ in range(objects):
        seconds, _ = simulate_transfer(transfer, draw)
        longest = max(longest, seconds)
        heapq.heapreplace(free, free[0] + seconds)
    return max(free), longest


def expected_pool(transfer: Transfer, connections: int, objects: int) -> float:
    """Seconds of the same when no connection is idle at the end."""
    return objects * expected_transfer(transfer) / connections
