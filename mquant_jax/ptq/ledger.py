"""Which parts of a conversion are finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mquant_jax.checkpoint.journal import Journal
from mquant_jax.errors import UserError


class Ledger:
    """Remembers nothing: for conversions in memory."""

    def done(self, key: str) -> dict[str, Any] | None:
        """The record of a part that an earlier process has finished."""
        return None

    def commit(self, key: str, record: dict[str, Any]) -> None:
        """A part is finished, and what it made is on the disk."""


class JournalLedger(Ledger):
    """Remembers in a journal, whose header says what the result depends on.

    Raises:
        UserError: the journal belongs to other inputs.
    """

    def __init__(self, journal: Journal, header: dict[str, Any]):
        journal.start(header)
        self._journal = journal
        self._done = {record["key"]: record for record in self.records}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What is finished, in order."""
        return self._journal.records[1:]

    def check(self, holds: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Raises:
            UserError: a file that was finished is not as it was.
        """
        for record in self.records:
            if "file" in record and not holds(record):
                raise UserError(
                    f"{self._journal.path.parent}: {record['file']} is not as it was written; "
                    "begin anew with --restart"
                )

    def done(self, key: str) -> dict[str, Any] | None:
        return self._done.get(key)

    def commit(self, key: str, record: dict[str, Any]) -> None:
        self._journal.append({"key": key, **record})
        self._done[key] = self._journal.records[-1]
