"""Benchmark questions, and tasks, which declare how questions are asked and judged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.eval import scoring
from mquant_jax.eval.scoring import Metrics, Score, Table, Verdict
from mquant_jax.samples import Sample

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Fields:
    """A row of a published file with uniform field names.

    Attributes:
        id: the row's id in the file, or its number.
        question: the question's text only.
        answers: accepted answers.
        images: anything that :func:`mquant_jax.models.images.load_image` accepts.
        choices: letter -> text of the options, in order; empty without options.
        category: the category that results are grouped by, or "".
        hint: text before the question, or "".
        raw: the original row.
        where: file and line, for messages.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[Any, ...] = ()
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    category: str = ""
    hint: str = ""
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, and what judging its answer needs.

    Attributes:
        id: unique among the task's questions.
        sample: the prompt's text and pictures.
        answers, choices, category: see :class:`Fields`.
        group: questions of one group are resampled together.
    """

    id: str
    sample: Sample
    answers: tuple[str, ...] = ()
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    category: str = ""
    group: str = ""


def _ask_plainly(fields: Fields) -> str:
    return fields.question


def _details(table: Table) -> Metrics:
    return scoring.category_means(table)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: value of ``--task``.
        title: the benchmark's name.
        unit: unit of the score.
        judge: ``(answer, question) -> verdict``; ``None`` if a text is scored.
        ask: builds the prompt's text.
        suffix: text that ``ask`` appends to every question; recorded with the results.
        score, details: computed from a judged table: the published score, and further metrics.
        group: key shared by questions that belong together; default: every question by itself.
        arrange: for questions that place their pictures, the parts of the user's message (text and
            pictures) and the pictures in that order; default: pictures, then text.
        category: columns that may hold the category, or a function of the row.
        rules: how options are parsed from answers, for the record; "" if they are not.
        read: ``(file, task, limit) -> questions``, for files that are not tables of questions.
        data: default file.
        max_new_tokens: maximum length of an answer; 0: nothing is generated, the text is scored.
        stratified: resampling keeps the number of questions per category.
        lower_is_better: true for perplexity, for example.
    """

    name: str
    title: str
    unit: str
    judge: Callable[[str, Question], Verdict] | None = None
    ask: Callable[[Fields], str] = _ask_plainly
    suffix: str = ""
    score: Score = scoring.percent
    details: Callable[[Table], Metrics] = _details
    group: Callable[[Fields], str] | None = None
    arrange: Callable[[Fields, str], tuple[list[dict[str, Any]], tuple[Any, ...]]] | None = None
    category: tuple[str, ...] | Callable[[Mapping[str, Any]], str] = ("category",)
    rules: str = ""
    read: Callable[[Path, Task, int | None], list[Question]] | None = None
    data: Path | None = None
    max_new_tokens: int = 64
    stratified: bool = False
    lower_is_better: bool = False

    def question(self, fields: Fields) -> Question:
        """The question in a row."""
        text = self.ask(fields) + self.suffix
        images = fields.images
        messages: tuple[dict[str, Any], ...] = ()
        if self.arrange is not None:
            parts, images = self.arrange(fields, text)
            messages = ({"role": "user", "content": parts},) if parts else ()
        truth = fields.answers[0] if fields.answers else ""
        sample = Sample(images, text, truth, fields.category, messages, fields.where)
        group = self.group(fields) if self.group else fields.id
        return Question(fields.id, sample, fields.answers, fields.choices, fields.category, group)


def with_options(fields: Fields) -> str:
    """Hint, question and lettered options, one per line."""
    lines = [fields.hint] if fields.hint else []
    lines += [fields.question, *(f"{letter}. {text}" for letter, text in fields.choices.items())]
    return "\n".join(lines)


def picture_key(image: Any) -> str:
    """An identifier of a picture: a hash of its bytes, or its file name."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
    return Path(image).name
