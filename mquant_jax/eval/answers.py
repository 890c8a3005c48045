"""Answers saved as they are generated: an append-only JSONL file from which a run can resume."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.eval import hosts
from mquant_jax.validate import shown

HEADER = "run"
_CURE = "choose another --out, or remove the file to start over"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        text: the answer; "" if a text is scored.
        tokens: number of generated or scored tokens.
        nats: the summed loss of a scored text, otherwise ``None``.
        ids: the generated tokens.
    """

    text: str
    tokens: int
    nats: float | None = None
    ids: tuple[int, ...] = ()


_KEYS = {"id", *(field.name for field in dataclasses.fields(Answer))}


class Answers:
    """The answers of one run, in memory only.

    Attributes:
        found: question id -> answer.
    """

    def __init__(self) -> None:
        self.found: dict[str, Answer] = {}

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Add the answers of a batch."""
        self.found.update(answers)

    def merge(self) -> None:
        """Add the answers of the other hosts. Every host must call this."""
        found = hosts.merged({k: dataclasses.asdict(a) for k, a in self.found.items()})
        self.add([(key, _answer(row)) for key, row in found.items()])


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(**{**row, "ids": tuple(row["ids"])})


class AnswerFile(Answers):
    """Answers saved to a file; questions that it already answers are not asked again.

    The first line is the run's header, every other line an answer. An incomplete last line, left
    by a killed run, is removed. Hosts other than the first append their number to the file name,
    and each host reads the answers of all such files that it finds.

    Args:
        path: file of the first host.
        header: everything that answers depend on.
        host: index of this host.

    Raises:
        UserError: the file belongs to a run with another header, or is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], host: int = 0):
        super().__init__()
        self.header = json.loads(json.dumps(header))
        self.path = path.with_name(f"{path.stem}-{host}{path.suffix}") if host else path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cut()
        others = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
        for each in (path, *others):
            self._read(each)
        if not self.path.exists():
            self._append([{HEADER: self.header}])

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Add the answers of a batch and append the new ones to the file."""
        new = [(key, answer) for key, answer in answers if key not in self.found]
        super().add(new)
        self._append([{"id": key, **dataclasses.asdict(answer)} for key, answer in new])

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())

    def _cut(self) -> None:
        """Remove an incomplete last line, but not of other hosts' files, which may be growing."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if not whole:
            self.path.unlink(missing_ok=True)
        elif whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _read(self, path: Path) -> None:
        data = path.read_bytes() if path.exists() else b""
        lines = data.decode("utf-8", "surrogatepass").split("\n")[:-1]
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            row = _row(line, where)
            if number == 1:
                self._check(row, path)
                continue
            kinds = [type(row.get(name)) for name in ("id", "text", "tokens", "ids")]
            if kinds != [str, str, int, list] or not row.keys() <= _KEYS:
                raise UserError(f"{where}: not an answer; {_CURE}")
            key = row.pop("id")
            self.found[key] = _answer(row)

    def _check(self, first: Mapping[str, Any], path: Path) -> None:
        found = first.get(HEADER)
        if found == self.header:
            return
        if not isinstance(found, dict):
            raise UserError(f"{path}: not an answer file; {_CURE}")
        other = next(k for k in (*self.header, *found) if self.header.get(k) != found.get(k))
        raise UserError(
            f"{path}: its answers were made with a different {other}: "
            f"{shown(found.get(other))}, now {shown(self.header.get(other))}; {_CURE}"
        )


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: damaged: {e}; {_CURE}") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: damaged: not a JSON object; {_CURE}")
    return row
