"""The record of a running conversion: one line of JSON per finished step, flushed to the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.tensor_file import sync_folder
from mquant_jax.errors import UserError

_SHOWN = 10


class Journal:
    """An append-only file of JSON objects, one per line.

    The first record is the header, a fingerprint of everything that the result depends on. A last
    line that was cut off by a kill is dropped, and its step is repeated.

    Attributes:
        path: the file; the first :meth:`append` creates it.
        records: its records, the header first.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            UserError: the file cannot be read, or is damaged before its last line.
        """
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as e:
            raise UserError(f"{self.path}: cannot be read: {e.strerror}") from e
        self._good = 0  # bytes of complete records
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is None:
                if number < len(lines):
                    raise UserError(
                        f"{self.path}: line {number} is damaged; begin anew with --restart"
                    )
                break
            self.records.append(record)
            self._good += len(line)

    def start(self, header: dict[str, Any]) -> None:
        """Record the fingerprint, or compare it with the recorded one.

        Raises:
            UserError: the recorded work belongs to other inputs; all differences are named.
        """
        header = json.loads(json.dumps(header))
        if not self.records:
            self.append(header)
            return
        found = list(differences(self.records[0], header))
        if found:
            more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise UserError(
                f"{self.path.parent}: belongs to a conversion of other inputs: "
                f"{', '.join(found[:_SHOWN])}{more}; repeat that conversion's arguments, or begin "
                "anew with --restart"
            )

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk on return.

        Raises:
            OSError: for example a full disk; the record is then not added.
        """
        line = (json.dumps(record) + "\n").encode()
        new = not self.path.exists()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, self._good)  # a torn line, left by a kill or a full disk
            os.lseek(fd, self._good, os.SEEK_SET)
            data = memoryview(line)
            while data.nbytes:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if new:
            sync_folder(self.path.parent)
        self._good += len(line)
        self.records.append(json.loads(line))


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the object of a complete line; ``None`` if the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Return ``path: old there, new here`` for everything that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inside = f"{where}.{key}" if where else key
            yield from differences(old.get(key), new.get(key), inside)
    elif old != new:
        yield f"{where} (there {_short(old)}, now {_short(new)})"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
