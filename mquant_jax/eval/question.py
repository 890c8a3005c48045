"""A question of a benchmark, and what a task declares about its questions."""

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
    """A row of a published file, its fields under one set of names.

    Attributes:
        id: what the file calls the row, or its number.
        question: the bare text.
        answers: accepted ones.
        images: whatever :func:`mquant_jax.models.images.load_image` takes.
        choices: letter -> text of the options, in order; empty where there are none.
        category: what results are grouped by, or "".
        hint: text before the question, or "".
        raw: the row as it was.
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
    """What is asked and how the answer is judged.

    Attributes:
        id: unique among the task's questions.
        sample: the prompt's text and pictures.
        answers, choices, category: see :class:`Fields`.
        group: questions of one group belong together: they are resampled as one.
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
        name: as ``--task`` takes it.
        title: the benchmark's own name.
        unit: what the score is in.
        judge: the answer's text and its question to a verdict; none where a text is scored.
        ask: the prompt's text.
        suffix: what ``ask`` puts behind every question; recorded with the results.
        score, details: of a judged table; the published score, and what is published beside it.
        group: questions that belong together have the same; default: each its own.
        arrange: parts of the user's message (text and pictures in turn) and the pictures in their
            order, for questions that place them; default: pictures, then text.
        category: names of the columns that may hold the category, or a function of the row.
        rules: how options are read out of answers, for the record; "" where none are.
        read: ``(file, task, limit) -> questions``, for files that are no tables of questions.
        data: the file that is read where none is given.
        max_new_tokens: of an answer; 0: nothing is generated, the text is scored.
        stratified: resamples keep the number of questions of each category.
        lower_is_better: as of perplexity.
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
        """The question that a row asks."""
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
    """Hint, question, and the options with their letters, a line each."""
    lines = [fields.hint] if fields.hint else []
    lines += [fields.question, *(f"{letter}. {text}" for letter, text in fields.choices.items())]
    return "\n".join(lines)


def picture_key(image: Any) -> str:
    """What tells a picture from others: a hash of its bytes, or a file's name."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()
    return Path(image).name
