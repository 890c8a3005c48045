"""Map the columns of published files to uniform field names."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.eval.question import Fields, Question, Task
from mquant_jax.eval.readers.files import IMAGES, Row, listed, read_rows
from mquant_jax.eval.readers.shards import SPLIT, files_of, split_of
from mquant_jax.validate import path as checked_path
from mquant_jax.validate import shortened

_IDS = ("index", "question_id", "questionId", "id", "pid", "qid")
_QUESTIONS = ("question", "query", "text")
_ANSWERS = ("answers", "answer", "label", "gt_answer")
_OPTIONS = ("options", "choices")
_HINTS = ("hint", "context")
_MISSING = ("", "nan")  # missing values in text written by data frames


def read_questions(
    path: Path, task: Task, limit: int | None = None, split: str | None = None
) -> list[Question]:
    """The questions in a benchmark's file or files, in order.

    Args:
        limit: maximum number of questions.
        split: the split to use, by file name or by the column ``split``.

    Raises:
        UserError: see :func:`files_of` and :func:`read_rows`; a row without a question or an
            answer; no rows, or none in the split.
    """
    questions: list[Question] = []
    rows = enumerate(_rows_of(path, split))
    for fields in unique_ids(fields_of(row, task, i) for i, row in rows):
        if limit is not None and len(questions) == limit:
            break
        questions.append(task.question(fields))
    if not questions:
        raise UserError(f"{path}: no questions")
    return questions


def _rows_of(path: Path, split: str | None) -> Iterator[Row]:
    """
    Raises:
        UserError: see :func:`read_questions`.
    """
    kept, others = 0, set()
    for file in files_of(checked_path(path, "data"), split):
        for where, raw in read_rows(file):
            named = raw.get(SPLIT) if split_of(file) != split else split
            if split is None or named == split:
                kept += 1
                yield where, raw
            else:
                others.add(str(named))
    if others and not kept:
        found = ", ".join(sorted(others - {"None"})) or "none in rows or file names"
        raise UserError(f"{path}: has no split {split!r}; found {found}")


def unique_ids(rows: Iterable[Fields]) -> Iterator[Fields]:
    """Append the row's number to ids that occurred before."""
    seen: set[str] = set()
    for number, fields in enumerate(rows):
        if fields.id in seen:
            fields = dataclasses.replace(fields, id=f"{fields.id}#{number}")
        seen.add(fields.id)
        yield fields


def fields_of(row: Row, task: Task, number: int) -> Fields:
    """
    Raises:
        UserError: no question, no answer, or an answer that is not an option.
    """
    where, raw = row
    try:
        choices = _choices(raw)
        question = _first(raw, _QUESTIONS)
        if question is None:
            raise UserError(f"expected one of the columns {', '.join(_QUESTIONS)}; found "
                            f"{shortened(', '.join(raw))}")  # fmt: skip
        answers = _answers(raw)
        if choices:
            answers = tuple(_option(answer, choices, raw) for answer in answers)
        return Fields(
            _text(_first(raw, _IDS) if _first(raw, _IDS) is not None else number),
            question, answers, tuple(raw[IMAGES]), choices, _category(raw, task),
            _first(raw, _HINTS) or "", raw, where,
        )  # fmt: skip
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value in _MISSING)


def _first(raw: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The value of the first of these columns that has one, as text."""
    return next((_text(raw[n]) for n in names if not _is_missing(raw.get(n))), None)


def _answers(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Accepted answers: a list, a list as text, or one text or number. "None" is an answer."""
    for name in _ANSWERS:
        value = raw.get(name)
        if value is None or value != value or value == "":
            continue
        items = listed(value)
        found = [value] if items is None else items
        found = [x.get("answer") if isinstance(x, Mapping) else x for x in found]
        if not found or any(isinstance(x, list | dict | None) for x in found):
            raise UserError(f"{name} is {shortened(value, 60)}; expected a text or a list of texts")
        return tuple(map(_text, found))
    raise UserError(f"no answer; expected one of the columns {', '.join(_ANSWERS)}")


def _choices(raw: Mapping[str, Any]) -> dict[str, str]:
    """Options from columns A, B, ..., or from one list; empty without options."""
    found = {c: _text(raw[c]) for c in string.ascii_uppercase if not _is_missing(raw.get(c))}
    for name in _OPTIONS:
        if not found and (items := listed(raw.get(name))):
            found = dict(zip(string.ascii_uppercase, map(_text, items), strict=False))
    return found


def _option(answer: str, choices: Mapping[str, str], raw: Mapping[str, Any]) -> str:
    """The letter of the right option. Files give a letter, an index from 0, or the text.

    Raises:
        UserError: the answer is not an option.
    """
    if answer.strip().upper() in choices:
        return answer.strip().upper()
    letters = list(choices)
    in_a_list = any(raw.get(name) is not None for name in _OPTIONS)
    if in_a_list and answer.isdecimal() and int(answer) < len(letters):
        return letters[int(answer)]
    if answer in choices.values():
        return next(letter for letter, text in choices.items() if text == answer)
    raise UserError(f"the answer {shortened(answer, 40)!r} is not among the options "
                    f"{', '.join(letters)}")  # fmt: skip


def _category(raw: Mapping[str, Any], task: Task) -> str:
    if callable(task.category):
        return task.category(raw)
    return _first(raw, task.category) or ""
