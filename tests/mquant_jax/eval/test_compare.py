"""Comparison of two models: McNemar's test and bootstrap intervals, on hand-computed cases."""

import dataclasses

import pytest

from mquant_jax.eval.compare import compare, interval, mcnemar
from mquant_jax.eval.scoring import Table, Verdict, table_of
from mquant_jax.eval.tasks import TASKS
from mquant_jax.eval.tasks.plain import questions_from
from mquant_jax.samples import Sample


def test_mcnemar_and_bootstrap_by_hand() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    a = _table([1, 1, 1, 1]), _table([1, 1, 1, 1])
    assert interval(TASKS["jsonl"], *a) == (0, 0)
    first, other = _table([1] * 50 + [0] * 50), _table([1] * 40 + [0] * 60)
    low, high = interval(TASKS["jsonl"], first, other)
    spread = 1.96 * 100 * (0.1 * 0.9 / 100) ** 0.5  # of a mean of -1 (10 %) and 0
    assert low == pytest.approx(-10 - spread, abs=1) and high == pytest.approx(-10 + spread, abs=1)
    assert interval(TASKS["jsonl"], first, other) == (low, high)  # seeded
    assert compare(TASKS["jsonl"], first, other).right_to_wrong == tuple(range(40, 50))


def test_mme_is_resampled_by_picture_within_categories() -> None:
    questions = [
        dataclasses.replace(q, category=c, group=f"{c}/{i // 2}", answers=("yes",))
        for c in ("color", "OCR")
        for i, q in enumerate(questions_from([Sample((), "?")] * 4))
    ]
    table = table_of([Verdict(1.0)] * 8, questions)
    wrong = table_of([Verdict(0.0)] * 8, questions)
    assert interval(TASKS["mme"], wrong, table) == (400, 400)


def _table(scores) -> Table:
    questions = questions_from([Sample((), "?")] * len(scores))
    return table_of([Verdict(float(s)) for s in scores], questions)
