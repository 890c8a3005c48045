"""Wall-clock time of the stages of a long run, such as a conversion."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)
Listener = Callable[[str, float], None]
_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("stage", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Time the block; also usable as a decorator. Stages do not nest.

    The time is logged at INFO level and passed to the listener of :func:`listening`, if there is
    one. A block that raises is reported as well.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        _log.info("%s: %.1f s", name, seconds)
        if (listener := _LISTENER.get()) is not None:
            listener(name, seconds)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener(name, seconds)`` at the end of every stage inside the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
