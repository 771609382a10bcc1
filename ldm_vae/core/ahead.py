"""Waiting for many answers at once: of a server, each of which takes its time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map`, in order, with up to twice as many calls under way or done as there are `threads`; with one a plain map.

    >>> list(ahead(abs, [-1, 2, -3], threads=2))
    [1, 2, 3]
    """
    if threads == 1:
        yield from map(function, items)
        return
    pool, coming = ThreadPoolExecutor(threads, "ahead"), deque[Future[R]]()
    try:
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) >= 2 * threads:  # the executor's own map would submit all of them
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
