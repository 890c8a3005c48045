"""Which parts of a conversion are finished."""

from __future__ import annotations

from typing import Any


class Ledger:
    """Remembers nothing: for conversions in memory."""

    def done(self, key: str) -> dict[str, Any] | None:
        """The record of a part that an earlier process has finished."""
        return None

    def commit(self, key: str, record: dict[str, Any]) -> None:
        """A part is finished, and what it made is on the disk."""
