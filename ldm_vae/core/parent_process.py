"""Parent process of this one, recorded when the package is first imported, before torch is.

torch takes seconds to import, and a parent that is killed in them is another one (init, or a process that adopts
orphans) by the time of a question. That it is 1 proves nothing: a launcher in a container may be 1.
"""

from __future__ import annotations

import os

_parent = os.getppid()


def _remember() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_remember)


def is_gone() -> bool:
    """True when the process that started this one has ended."""
    return os.getppid() != _parent
