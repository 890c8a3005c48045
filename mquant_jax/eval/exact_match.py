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
    """Outcome of one run.

    Attributes:
        answers: what the model said, one per sample.
        correct: whether it equals the expected answer (surrounding blanks aside).
        tasks: each sample's task label.
    """

    answers: list[str]
    correct: list[bool]
    tasks: list[str]

    @property
    def score(self) -> float:
        """Share of correct answers, 0..1."""
        return sum(self.correct) / len(self.correct)

    def by_task(self) -> dict[str, float]:
        """Share of correct answers per task."""
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

    The results come in the order of ``samples``.

    Raises:
        UserError: a bad option; no samples, or samples that cannot be made prompts, each named.
    """
    options = Options(max_new_tokens, batch_size=batch_size)
    questions = questions_from(samples)
    answers = [answer.text for answer in ask(model, questions, options, progress=progress)]
    correct = [exact_match(a, [s.answer]) == 1 for a, s in zip(answers, samples, strict=True)]
    return ExactMatch(answers, correct, [s.task for s in samples])
