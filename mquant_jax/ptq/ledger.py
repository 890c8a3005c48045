"""Records which parts of a conversion are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mquant_jax.checkpoint.journal import Journal
from mquant_jax.errors import UserError

LEARNED = "learned"  # keys of the parts' files once their scales have been learned


class Ledger:
    """A ledger that remembers nothing, for conversions in memory."""

    def done(self, key: str) -> dict[str, Any] | None:
        """Return the record of a part that an earlier process finished, or ``None``."""
        return None

    def below(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the finished parts of a pass, in order, with their records."""
        return iter(())

    def commit(self, key: str, record: dict[str, Any]) -> None:
        """Record that a part is finished and its result is on the disk."""


class JournalLedger(Ledger):
    """A ledger kept in a journal, whose header names everything the result depends on.

    Raises:
        UserError: the journal belongs to other inputs.
    """

    def __init__(self, journal: Journal, header: dict[str, Any]):
        journal.start(header)
        self._journal = journal
        self._done = {record["key"]: record for record in self.records}

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of finished parts, in order."""
        return self._journal.records[1:]

    def files(self) -> dict[str, dict[str, Any]]:
        """Return the record of each part's file: the one with learned scales, once all are
        learned."""
        learned = self.done(f"{LEARNED}/all") is not None
        named = [r for r in self.records if "file" in r]
        first = {r["part"]: r for r in named if not r["key"].startswith(LEARNED)}
        then = {r["key"].removeprefix(f"{LEARNED}/"): r for r in named if r not in first.values()}
        return first | then if learned else first

    def check(self, holds: Callable[[Mapping[str, Any]], bool]) -> None:
        """Raises:
        UserError: a finished file has changed.
        """
        for record in self.files().values():
            if not holds(record):
                raise UserError(
                    f"{self._journal.path.parent}: {record['file']} is not as it was written; "
                    "begin anew with --restart"
                )

    def done(self, key: str) -> dict[str, Any] | None:
        return self._done.get(key)

    def below(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, record in self._done.items():
            if key.startswith(f"{name}/"):
                yield key.removeprefix(f"{name}/"), record

    def commit(self, key: str, record: dict[str, Any]) -> None:
        self._journal.append({"key": key, **record})
        self._done[key] = self._journal.records[-1]
