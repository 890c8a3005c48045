"""Yes/no benchmarks. MME has its own prompt; POPE's is lmms-eval's."""

from __future__ import annotations

from mquant_jax.eval import metrics, scoring
from mquant_jax.eval.question import SHORT_ANSWER, Fields, Question, Task, picture_key
from mquant_jax.eval.scoring import Verdict


def _mme(answer: str, question: Question) -> Verdict:
    word = metrics.mme_word(answer)
    return Verdict(float(word == question.answers[0].strip().lower()), word)


def _pope(answer: str, question: Question) -> Verdict:
    word = metrics.pope_word(answer)
    return Verdict(float(word == question.answers[0].strip().lower()), word)


def _pair(fields: Fields) -> str:
    """Key of a picture's two questions; has the category, because categories share pictures."""
    return "/".join([fields.category, *map(picture_key, fields.images)])


TASKS = (
    Task(
        "mme", "MME, perception and cognition", "of 2800", _mme,
        score=scoring.mme, details=scoring.mme_metrics, group=_pair, stratified=True,
        max_new_tokens=16,
    ),
    Task(
        "pope", "POPE, F1 of yes", "%", _pope,
        suffix=SHORT_ANSWER, score=scoring.pope, details=scoring.pope_details, max_new_tokens=16,
    ),
)  # fmt: skip
