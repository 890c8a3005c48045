"""Which parts of a conversion are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mquant_jax.checkpoint.journal import Journal
from mquant_jax.errors import UserError

LEARNED = "learned"  # keys of the files that parts have once their scales were learned


class Ledger:
    """Remembers nothing: for conversions in memory."""

    def done(self, key: str) -> dict[str, Any] | None:
        """The record of a part that an earlier process has finished."""
        return None

    def below(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The parts of a pass that are finished, in order, with their records."""
        return iter(())

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

    def files(self) -> dict[str, dict[str, Any]]:
        """The record of each part's file: the one with learned scales, once all are learned."""
        learned = self.done(f"{LEARNED}/all") is not None
        named = [r for r in self.records if "file" in r]
        first = {r["part"]: r for r in named if not r["key"].startswith(LEARNED)}
        then = {r["key"].removeprefix(f"{LEARNED}/"): r for r in named if r not in first.values()}
        return first | then if learned else first

    def check(self, holds: Callable[[Mapping[str, Any]], bool]) -> None:
        """
        Raises:
            UserError: a file that was finished is not as it was.
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
