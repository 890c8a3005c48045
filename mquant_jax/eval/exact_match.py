"""Exact match of generated answers on picture-and-question samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from mquant_jax.api import Model
from mquant_jax.errors import UserError
from mquant_jax.runtime.options import Options
from mquant_jax.samples import Sample, each


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
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> ExactMatch:
    """Answer every sample greedily.

    Batches are cut from the samples sorted by prompt length, so that little is padding; the
    results come in the order of ``samples``.

    Raises:
        UserError: a bad option; no samples, or samples that cannot be made prompts, each named.
    """
    options = Options(max_new_tokens, batch_size=batch_size)
    if not samples:
        raise UserError("no samples to evaluate")
    batch_size = min(options.batch_size, len(samples))
    prompts = each(samples, lambda sample: sample.prompt(model.processor), progress)
    by_length = sorted(range(len(samples)), key=lambda i: len(prompts[i].input_ids))
    answers = [""] * len(samples)
    starts = range(0, len(samples), batch_size)
    for start in progress(starts, "answer"):
        rows = by_length[start : start + batch_size]
        out = model.generate_prompts([prompts[i] for i in rows], options.max_new_tokens)
        for i, ids in zip(rows, out.tokens, strict=True):
            answers[i] = model.processor.decode(ids)
    correct = [a.strip() == s.answer.strip() for a, s in zip(answers, samples, strict=True)]
    return ExactMatch(answers, correct, [s.task for s in samples])
