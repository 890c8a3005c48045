"""The package's own samples, easy-VQA, and the perplexity of a text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.eval import metrics, scoring
from mquant_jax.eval.question import Question, Task
from mquant_jax.eval.scoring import Verdict
from mquant_jax.files import read_text
from mquant_jax.samples import BUNDLED_HELDOUT, Sample, read_samples


def _exact(answer: str, question: Question) -> Verdict:
    return Verdict(metrics.exact_match(answer, question.answers), answer.strip())


def _caseless(answer: str, question: Question) -> Verdict:
    return Verdict(metrics.caseless_match(answer, question.answers), answer.strip())


def questions_from(samples: Sequence[Sample]) -> list[Question]:
    """Samples as questions, with their index as id."""
    return [
        Question(str(i), s, (s.answer,), category=s.task, group=str(i))
        for i, s in enumerate(samples)
    ]


def _samples(path: Path, task: Task, limit: int | None) -> list[Question]:
    return questions_from(read_samples(path, limit))


def _easyvqa(path: Path, task: Task, limit: int | None) -> list[Question]:
    """questions.json of the package: ``[[question, answer, picture number], ...]``, with the
    pictures in the folder images/ next to it."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of [question, answer, picture number]")
    samples = []
    for i, row in enumerate(rows[:limit]):
        match row:
            case [str(question), str(answer), int(number)]:
                picture = path.parent / "images" / f"{number}.png"
                samples.append(Sample((picture,), question, answer, where=f"{path}: row {i}"))
            case _:
                raise UserError(f"{path}: row {i}: expected [question, answer, picture number]")
    return questions_from(samples)


def _easyvqa_data() -> Path | None:
    """The test questions of the package, if it is installed."""
    found = importlib.util.find_spec("easy_vqa")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "data" / "test" / "questions.json" if places else None


def _text(path: Path, task: Task, limit: int | None) -> list[Question]:
    """One text, to be split into windows by a model's tokenizer."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: no text")
    return [Question("0", Sample((), text, where=str(path)), group="0")]


TASKS = (
    Task(
        "demo", "held-out set of the demo model, exact match", "%", _exact,
        read=_samples, data=BUNDLED_HELDOUT, max_new_tokens=16,
    ),
    Task("jsonl", "samples, exact match", "%", _exact, read=_samples, max_new_tokens=16),
    Task(
        "easyvqa", "easy-VQA, accuracy", "%", _caseless,
        read=_easyvqa, data=_easyvqa_data(), max_new_tokens=8,
    ),
    Task(
        "perplexity", "perplexity of a text", "per token",
        score=scoring.perplexity, details=scoring.perplexity_metrics, read=_text,
        max_new_tokens=0, lower_is_better=True,
    ),
)  # fmt: skip
