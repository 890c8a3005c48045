"""Exact match of generated answers on picture-and-question samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mquant_jax.api import Model
from mquant_jax.eval.metrics import exact_match
from mquant_jax.eval.runner import Progress, ask, silent
from mquant_jax.eval.tasks.plain import questions_from
from mquant_jax.runtime.options import Options
from mquant_jax.samples import Sample


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """The result of one run.

    Attributes:
        answers: the model's answer to each sample.
        correct: whether it equals the expected answer, ignoring surrounding whitespace.
        tasks: the task label of each sample.
    """

    answers: list[str]
    correct: list[bool]
    tasks: list[str]

    @property
    def score(self) -> float:
        """Fraction of correct answers, 0..1."""
        return sum(self.correct) / len(self.correct)

    def by_task(self) -> dict[str, float]:
        """Fraction of correct answers per task."""
        out = {}
        for task in sorted(set(self.tasks)):
            hits = [c for c, t in zip(self.correct, self.tasks, strict=True) if t == task]
            out[task] = sum(hits) / len(hits)
        return out


def evaluate(
    model: Model,
    samples: Sequence[Sample],
    *,
    batch_size: int = 50,
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> ExactMatch:
    """Answer every sample greedily.

    Results are in the order of ``samples``.

    Raises:
        UserError: a bad option; no samples, or invalid samples (the message lists each).
    """
    options = Options(max_new_tokens, batch_size=batch_size)
    questions = questions_from(samples)
    answers = [answer.text for answer in ask(model, questions, options, progress=progress)]
    correct = [exact_match(a, [s.answer]) == 1 for a, s in zip(answers, samples, strict=True)]
    return ExactMatch(answers, correct, [s.task for s in samples])
