"""Ownership of a store at any place: of a folder by its marks (`core/ownership.py`), of a URL by claims.

A claim is an object `.owner.ROLE.TOKEN` of the one launch that chose the token, so no two write the same one. Whoever
wants the store puts a claim that asks, lists, and takes it back if it sees anybody else's: of two that come at once at
least one sees the other, whichever way their requests fall, as long as a listing shows what was put before it (all
large object stores promise that). Then it puts the claim that holds, and touches it every 20 s. One that was not
touched for 60 s, by the clock of the store, is removed by whoever wants the store; its holder may only have been
suspended, so it looks before it publishes, and also for a second claim that a store without such listings has let
through: of two the one with the larger token gives up. Until then both do equal work: a unit has one name and one
content.
"""

from __future__ import annotations

import contextlib
import math
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from ldm_vae.core import ownership
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import LEASE, WHOLE, Part, own_together, refusal
from ldm_vae.latent_store.storage.places import Place, storage_at

WHOLE_ROLE, TURN_ROLE, ASKS = "whole", "turn", "asks"
LONGEST_PAUSE = 2.0  # seconds between looks at a claim of somebody else

_jitter = random.SystemRandom()  # never the global generator


class Owner(Protocol):
    """A launch's hold on a store, as each of its processes sees it."""

    def check(self) -> None:
        """Make sure that the store is still this launch's. Raises WorkError when another has taken it over."""

    def turn(self) -> AbstractContextManager[None]:
        """Do what one alone may do at a time: the owner of the whole at once, a part after the others' turns."""


@contextlib.contextmanager
def own_place(
    place: Place, field: str, rank: int = 0, barrier: Callable[[], None] = lambda: None, part: Part = WHOLE
) -> Iterator[Owner]:
    """Own a store, or a part of it, with all processes of a launch: as `ownership.own_together`, at any place.

    Raises:
        UsageError: another launch is at work on it and stays; nothing can be published there.
        WorkError: it cannot be written.
    """
    if not isinstance(place, str):
        with own_together(place, field, rank, barrier, part) as owner:
            yield owner
        return
    storage_at(place).prepare()
    role = role_of(part)
    claim = Claim(place, f"{field} {place}{'' if part.is_whole else f', part {part}'}", role)
    if rank == 0:
        with claim.held():
            barrier()
            yield claim
    else:
        barrier()
        # the claim of process 0: others of this role there are none
        theirs = [other for other in claim.seen() if other.role == role and not other.asks]
        yield Claim(claim.url, claim.what, role, theirs[0].token if theirs else "")


def role_of(part: Part) -> str:
    """The role of a part, or of the whole."""
    return WHOLE_ROLE if part.is_whole else part.suffix.removeprefix(".")


@dataclass(frozen=True)
class _Seen:
    """A claim as it is listed."""

    name: str
    role: str
    token: str
    asks: bool


@dataclass
class Claim:
    """A launch's claim of a role (the whole, a part, a turn) in the store at `url`."""

    url: str
    what: str
    """The store as messages name it."""
    role: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def check(self) -> None:
        """Costs one listing of a few objects."""
        seen = [one for one in self.seen() if not one.asks]
        if not any(one.token == self.token for one in seen):
            if self.token:  # of processes that were started each by itself the first may not be there yet
                raise WorkError(
                    f"{self.what}: another launch has taken it over, since this one did not answer for "
                    f"{ownership.LEASE_SECONDS:.0f} s; what was finished is kept, the same command goes on from there "
                    "when the other has ended"
                )
        elif any(self._excludes(one) and one.token < self.token for one in seen):
            raise WorkError(
                f"{self.what}: another launch is at work on it too, which its listing did not show before; this one "
                "gives way: what was finished is kept, the same command goes on from there when the other has ended"
            )

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        if self.role == WHOLE_ROLE:
            yield
        else:
            with Claim(self.url, f"{self.what}, one part at a time", TURN_ROLE).held(math.inf):
                yield

    @contextlib.contextmanager
    def held(self, patience: float | None = None) -> Iterator[None]:
        """Hold the role while the block runs.

        Args:
            patience: seconds to wait for others; by default those after which an abandoned claim is nobody's, and
                some more.

        Raises:
            UsageError: somebody else holds it, and still does.
        """
        self._take(ownership.LEASE_SECONDS + ownership.WAIT_SECONDS / 2 if patience is None else patience)
        ended = threading.Event()
        # a daemon: a request that hangs does not keep the program from ending
        threading.Thread(target=self._renew, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with contextlib.suppress(WorkError):  # it is nobody's after a minute
                storage_at(self.url).remove(self._name())

    def seen(self) -> list[_Seen]:
        """All claims of the store."""
        found = []
        for name in storage_at(self.url).names():
            head, *parts = name.removeprefix(f"{LEASE}.").split(".")
            if name.startswith(f"{LEASE}.") and parts:
                found.append(_Seen(name, head, parts[-1], ASKS in parts))
        return found

    def _take(self, patience: float) -> None:
        storage, asking, deadline, said = storage_at(self.url), self._name(ASKS), time.monotonic() + patience, False
        while True:
            storage.replace(asking, b"")
            try:
                others = [one for one in self.seen() if self._excludes(one)]
                if not self._alive(others, asking):
                    storage.replace(self._name(), b"")
                    return
            finally:
                storage.remove(asking)
            if time.monotonic() > deadline:
                raise refusal(self.what)
            if not said and any(not one.asks for one in others):
                limit = "" if patience == math.inf else f" up to {patience:.0f} s"
                print(f"{self.what}: another launch is at work on it; waiting{limit} for its end", file=sys.stderr)
                said = True
            # of two that asked at once both have gone back: they come again at different moments
            time.sleep(_jitter.uniform(0.05, 1.0) * min(LONGEST_PAUSE, patience))

    def _alive(self, others: list[_Seen], asking: str) -> bool:
        """True if one of the claims was touched lately; the others are removed."""
        storage = storage_at(self.url)
        now = storage.modified(asking) if others else None
        alive = False
        for one in others:
            then = storage.modified(one.name)
            if now is None or then is None:
                alive |= then is not None  # None: it has just gone
            elif now - then < ownership.LEASE_SECONDS:
                alive = True
            else:
                storage.remove(one.name)
        return alive

    def _renew(self, ended: threading.Event) -> None:
        storage = storage_at(self.url)
        while not ended.wait(ownership.LEASE_SECONDS / 3):
            # a claim that somebody has removed is not put again; a server that is away: tried again in 20 s
            with contextlib.suppress(WorkError, UsageError):
                if storage.sizes()(self._name()) >= 0 and not ended.is_set():
                    storage.replace(self._name(), b"")

    def _name(self, state: str = "") -> str:
        return ".".join(filter(None, (LEASE, self.role, state, self.token)))

    def _excludes(self, other: _Seen) -> bool:
        """True for somebody else's claim that this one cannot stand beside."""
        if other.token == self.token or (other.role == TURN_ROLE) != (self.role == TURN_ROLE):
            return False
        # other parts of as many; the whole is of no number
        return not (self.role != other.role and self.role.rpartition("-")[2] == other.role.rpartition("-")[2])
