"""A bounded cache of compiled programs, keyed by size."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from mquant_jax.compile_cache import seal_new

log = logging.getLogger(__name__)

# On CPU a model's program takes about 270 memory maps. A process has 65,530, and other JAX code in
# it needs some too.
LIMIT = 56


class Programs:
    """Compiled programs. Beyond ``limit`` the least recently used one is dropped.

    Attributes:
        limit: maximum number of live programs.
        compiled: programs compiled so far, including those dropped since.
    """

    def __init__(self, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected 1 or more")
        self.limit, self.compiled = limit, 0
        self._alive: OrderedDict[tuple[Hashable, tuple], Any] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Number of live programs."""
        return len(self._alive)

    def get(self, owner: Hashable, key: tuple, make: Callable[[], Any]) -> Any:
        """The program ``key`` of ``owner``, compiled by ``make()`` if it is missing."""
        with self._lock:
            if (owner, key) in self._alive:
                self._alive.move_to_end((owner, key))
                return self._alive[owner, key]
            began = time.perf_counter()
            program = make()
            seal_new()
            self.compiled += 1
            self._alive[owner, key] = program
            while len(self._alive) > self.limit:
                (_, dropped), _ = self._alive.popitem(last=False)
                log.info("dropped the program %s, the least recently used", dropped)
            seconds = time.perf_counter() - began
            log.info("compiled the program %s in %.1f s; %d of at most %d are alive",
                     key, seconds, len(self), self.limit)  # fmt: skip
            return program

    def keys(self, owner: Hashable) -> list[tuple]:
        """Keys of the live programs of ``owner``, least recently used first."""
        with self._lock:
            return [key for o, key in self._alive if o == owner]

    def forget(self, owner: Hashable) -> None:
        """Drop all programs of ``owner``."""
        with self._lock:
            for key in [k for k in self._alive if k[0] == owner]:
                del self._alive[key]


PROGRAMS = Programs()  # one for the process, because the limit on memory maps is per process
