"""What is kept between the parts of a conversion: hidden states and inputs, chunk by chunk.

Arrays stay in memory up to a budget that all of them share; beyond it they live in files of a
folder and are read when they are asked for. Arrays from which an interrupted conversion goes on are
written there in any case.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BUDGET = 1 << 30  # bytes in memory


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that a :class:`Spool` holds, in the place of the array."""

    spool: Spool
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def load(self) -> np.ndarray:
        """The array."""
        return self.spool[self.index]


def loaded(value: Any) -> Any:
    """An array, or a tuple of them, with what is stored read."""
    if isinstance(value, tuple):
        return tuple(map(loaded, value))
    return value.load() if isinstance(value, Stored) else value


class Spool(Sequence):
    """Arrays in the order in which they were appended.

    Args:
        states: whose budget and folder.
        key: a name under which the arrays can be found again by a later process; ``None``: they are
            this process's alone.
    """

    def __init__(self, states: States, key: str | None = None):
        self.states, self.key = states, key
        self._name = key.replace("/", ".") if key else f"tmp-{next(states.numbers)}"
        self._held: list[np.ndarray | None] = []

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        held = self._held[index]
        return np.load(self._path(index % len(self)), allow_pickle=False) if held is None else held

    def append(self, value: Any) -> Stored:
        """Keep an array; returns its place."""
        array, index = np.asarray(value), len(self)
        fits = self.states.take(array.nbytes)
        if self._durable or not fits:
            with self._path(index).open("wb") as file:
                np.save(file, array, allow_pickle=False)
        self._held.append(array if fits else None)
        return Stored(self, index, array.shape, array.dtype)

    def sync(self) -> None:
        """Flush what was written to the disk."""
        for index in range(len(self)) if self._durable else ():
            _flush(self._path(index))

    def release(self) -> None:
        """Give back the memory; only what another process may ask for stays, on the disk."""
        if not self._durable:
            self.clear()
        for index, held in enumerate(self._held):
            if held is not None:
                self.states.take(-held.nbytes)
                self._held[index] = None

    def clear(self) -> None:
        """Forget everything, files included."""
        for index, held in enumerate(self._held):
            self.states.take(-held.nbytes if held is not None else 0)
            if self._durable or held is None:
                self._path(index).unlink(missing_ok=True)
        self._held = []

    @property
    def _durable(self) -> bool:
        return self.key is not None and self.states.keeps

    def _path(self, index: int) -> Path:
        return self.states.folder / f"{self._name}.{index}.npy"


class States:
    """The budget and the folder of all spools of a conversion.

    Args:
        folder: where files go; ``None``: a temporary folder, and nothing outlives the process.
        budget: bytes of arrays that stay in memory.
    """

    def __init__(self, folder: Path | None = None, budget: int = BUDGET):
        self.keeps = folder is not None
        self._folder = folder
        self._temporary: str | None = None
        self._free = budget
        self.numbers: Iterator[int] = iter(range(1 << 62))

    @property
    def folder(self) -> Path:
        """Made when it is first needed."""
        if self._folder is None:
            self._temporary = tempfile.mkdtemp(prefix="mquant-states-")
            self._folder = Path(self._temporary)
        self._folder.mkdir(exist_ok=True)
        return self._folder

    def take(self, count: int) -> bool:
        """Reserve ``count`` bytes of memory (negative: give back); whether there were so many."""
        if count > self._free:
            return False
        self._free -= count
        return True

    def spool(self, key: str | None = None) -> Spool:
        """An empty spool."""
        return Spool(self, key)

    def found(self, key: str, count: int) -> Spool | None:
        """The ``count`` arrays that another process kept under ``key``, if all are there."""
        spool = Spool(self, key)
        if not self.keeps or not all(spool._path(i).is_file() for i in range(count)):
            return None
        spool._held = [None] * count
        return spool

    def forget(self, name: str) -> None:
        """Remove the files of all keys below ``name``: a pass that is done."""
        if self.keeps and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith(f"{name}."):
                    path.unlink()

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
