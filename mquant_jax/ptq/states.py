"""Storage for hidden states and inputs between the parts of a conversion, chunk by chunk.

Arrays stay in memory up to a shared budget. Beyond it they are written to files in a folder and
read on demand. Arrays needed to resume an interrupted conversion are always written there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BUDGET = 1 << 30  # bytes in memory


@dataclasses.dataclass(frozen=True)
class Stored:
    """Handle of an array in a :class:`Spool`."""

    spool: Spool
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def load(self) -> np.ndarray:
        """Return the array."""
        return self.spool[self.index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.load(), dtype, copy=copy)


def loaded(value: Any) -> Any:
    """Return an array, or a tuple of them, with stored arrays loaded."""
    if isinstance(value, tuple):
        return tuple(map(loaded, value))
    return value.load() if isinstance(value, Stored) else value


class Spool(Sequence):
    """A sequence of arrays, in the order in which they were appended.

    Args:
        states: provides the budget and the folder.
        key: name by which a later process finds the arrays; ``None``: they are private to this
            process.
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
        """Keep an array; return its handle."""
        array, index = np.asarray(value), len(self)
        fits = self.states.take(array.nbytes)
        if self._durable or not fits:
            with self._path(index).open("wb") as file:
                np.save(file, array, allow_pickle=False)
        self._held.append(array if fits else None)
        return Stored(self, index, array.shape, array.dtype)

    def handle(self, index: int) -> Stored:
        """Return the handle of an array."""
        array = self[index]
        return Stored(self, index, array.shape, array.dtype)

    def sync(self) -> None:
        """Flush written files to the disk."""
        for index in range(len(self)) if self._durable else ():
            _flush(self._path(index))

    def release(self) -> None:
        """Free the memory; only arrays with a key remain, on the disk."""
        if not self._durable:
            self.clear()
        for index, held in enumerate(self._held):
            if held is not None:
                self.states.take(-held.nbytes)
                self._held[index] = None

    def clear(self) -> None:
        """Remove all arrays, files included."""
        for index, held in enumerate(self._held):
            self.states.take(-held.nbytes if held is not None else 0)
            if self._durable or held is None:
                self._path(index).unlink(missing_ok=True)
        self._held = []

    def drained(self) -> Iterator[np.ndarray]:
        """Yield the arrays one after the other, then remove them."""
        yield from self
        self.clear()

    @property
    def _durable(self) -> bool:
        return self.key is not None and self.states.keeps

    def _path(self, index: int) -> Path:
        return self.states.folder / f"{self._name}.{index}.npy"


class States:
    """The budget and the folder shared by all spools of a conversion.

    Args:
        folder: where files go; ``None``: a temporary folder that does not outlive the process.
        budget: bytes of arrays kept in memory.
    """

    def __init__(self, folder: Path | None = None, budget: int = BUDGET):
        self.keeps = folder is not None
        self._folder = folder
        self._temporary: str | None = None
        self._free = budget
        self.numbers: Iterator[int] = iter(range(1 << 62))

    @property
    def folder(self) -> Path:
        """The folder, created on first use."""
        if self._folder is None:
            self._temporary = tempfile.mkdtemp(prefix="mquant-states-")
            self._folder = Path(self._temporary)
        self._folder.mkdir(exist_ok=True)
        return self._folder

    def take(self, count: int) -> bool:
        """Reserve ``count`` bytes of memory (negative: give back); return whether they were
        available."""
        if count > self._free:
            return False
        self._free -= count
        return True

    def spool(self, key: str | None = None) -> Spool:
        """Return an empty spool."""
        return Spool(self, key)

    def kept(self, arrays: Iterable[Any], key: str | None = None) -> Spool:
        """Return a spool of these arrays."""
        spool = self.spool(key)
        for x in arrays:
            spool.append(x)
        return spool

    def found(self, key: str, count: int) -> Spool | None:
        """Return the ``count`` arrays that another process kept under ``key``, if all exist."""
        spool = Spool(self, key)
        if not self.keeps or not all(spool._path(i).is_file() for i in range(count)):
            return None
        spool._held = [None] * count
        return spool

    def forget(self, name: str) -> None:
        """Remove the files of all keys below ``name``, when a pass is finished."""
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
