"""Answers on disk as they are made: an append-only JSONL file, from which a run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.validate import shown

HEADER = "run"
_CURE = "choose another --out, or remove the file to begin anew"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of one question.

    Attributes:
        text: the answer; "" for a text that is scored.
        tokens: generated, or scored.
        nats: the summed loss of a scored text, else ``None``.
    """

    text: str
    tokens: int
    nats: float | None = None


_KEYS = {"id", *(field.name for field in dataclasses.fields(Answer))}


class Answers:
    """The answers of one run, in memory alone.

    Attributes:
        found: question id -> answer.
    """

    def __init__(self) -> None:
        self.found: dict[str, Answer] = {}

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Keep the answers of a batch."""
        self.found.update(answers)


class AnswerFile(Answers):
    """The same, kept in a file; what it holds already is not asked again.

    Its first line is the run's header, each other one an answer. A last line that is not whole, as
    a killed run leaves it, is cut off.

    Args:
        header: all that answers depend on.

    Raises:
        UserError: the file is of a run with another header, or damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        super().__init__()
        self.path, self.header = path, json.loads(json.dumps(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        if not path.exists():
            self._append([{HEADER: self.header}])

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Keep the answers of a batch, those that are new in the file, too."""
        new = [(key, answer) for key, answer in answers if key not in self.found]
        super().add(new)
        self._append([{"id": key, **dataclasses.asdict(answer)} for key, answer in new])

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            self.path.unlink()
            return
        if whole != data:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.decode("utf-8", "surrogatepass").split("\n")[:-1]
        self._check(self._row(lines[0], 1))
        for number, line in enumerate(lines[1:], 2):
            row = self._row(line, number)
            kinds = [type(row.get(name)) for name in ("id", "text", "tokens")]
            if kinds != [str, str, int] or not row.keys() <= _KEYS:
                raise UserError(f"{self.path}:{number}: no answer; {_CURE}")
            key = row.pop("id")
            self.found[key] = Answer(**row)

    def _row(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{self.path}:{number}: damaged: {e}; {_CURE}") from e
        if not isinstance(row, dict):
            raise UserError(f"{self.path}:{number}: damaged: no JSON object; {_CURE}")
        return row

    def _check(self, first: Mapping[str, Any]) -> None:
        found = first.get(HEADER)
        if found == self.header:
            return
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: holds no answers of a run; {_CURE}")
        other = next(k for k in (*self.header, *found) if self.header.get(k) != found.get(k))
        raise UserError(
            f"{self.path}: its answers were made with another {other}: "
            f"{shown(found.get(other))}, now {shown(self.header.get(other))}; {_CURE}"
        )
