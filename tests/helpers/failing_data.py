"""A dataset whose work fails, in a module of its own, which is all that a spawned worker imports for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def memory_error() -> None:
    raise MemoryError


class Failing:
    """A dataset whose work is a function, and which cannot be imported where `broken` says so."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def __getitems__(self, tasks: list[Callable[[], Any]]) -> Any:
        return [work() for work in tasks]

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["broken"]:
            raise ImportError("no module of that name where the worker runs")
        self.__dict__ = state
