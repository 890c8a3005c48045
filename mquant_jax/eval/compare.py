"""Compare models on the same questions, with confidence intervals and tests."""

from __future__ import annotations

import dataclasses

import numpy as np

from mquant_jax.eval.question import Task
from mquant_jax.eval.scoring import Table, once

DRAWS = 2000
INTERVAL = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A model compared with the first.

    Attributes:
        delta: its score minus the first's, in the task's unit.
        ci95: paired bootstrap interval of ``delta``.
        mcnemar_p: p value of the exact two-sided test that as many answers turn right as wrong;
            ``None`` for tasks without right and wrong answers.
        right_to_wrong, wrong_to_right: indices of the flipped answers.
    """

    delta: float
    ci95: tuple[float, float]
    mcnemar_p: float | None = None
    right_to_wrong: tuple[int, ...] = ()
    wrong_to_right: tuple[int, ...] = ()


def compare(task: Task, first: Table, other: Table, seed: int = 0) -> Difference:
    """The paired difference of two tables of the same questions."""
    delta = task.score(other, once(other)) - task.score(first, once(first))
    ci95 = interval(task, first, other, seed)
    if task.judge is None:
        return Difference(delta, ci95)
    lost = np.flatnonzero(first.right & ~other.right)
    won = np.flatnonzero(~first.right & other.right)
    return Difference(
        delta, ci95, mcnemar(len(lost), len(won)), tuple(map(int, lost)), tuple(map(int, won))
    )


def interval(
    task: Task, first: Table, other: Table, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % paired bootstrap interval of the difference in score. Groups of questions are resampled,
    the same ones for both models."""
    rng = np.random.default_rng(seed)
    strata = _strata(first, task.stratified)
    differences = np.empty(draws)
    for i in range(draws):
        weights = _resample(rng, strata, first.groups)
        differences[i] = task.score(other, weights) - task.score(first, weights)
    low, high = np.quantile(differences, INTERVAL)
    return float(low), float(high)


def _strata(table: Table, by_category: bool) -> list[np.ndarray]:
    """The strata of the resampling: the groups of each category, or all groups."""
    parts = [rows for _, rows in table.by_category.values()] if by_category else [table]
    return [np.unique(rows.groups) for rows in parts]


def _resample(rng: np.random.Generator, strata: list[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """The number of times each question is drawn, float64 ``[n]``."""
    counts = np.zeros(int(groups.max()) + 1)
    for stratum in strata:
        drawn = rng.integers(0, len(stratum), len(stratum))
        counts[stratum] += np.bincount(drawn, minlength=len(stratum))
    return counts[groups]


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p value of the flips under a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
