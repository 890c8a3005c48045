"""A benchmark's published score from judged answers, or from a resample of its questions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mquant_jax.eval.metrics import YES

RIGHT = 0.5  # an answer with at least this score is right
MME_PARTS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"),
}  # fmt: skip

TEXT_RECOGNITION = (  # of OCRBench, 50 questions each
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
    "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement of an answer.

    Attributes:
        score: 0..1; for a window of text, its loss in nats.
        reading: the parsed answer: an option's letter, yes or no, ...
        size: its weight; for a window of text, its number of tokens.
    """

    score: float
    reading: str = ""
    size: float = 1.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The judged answers of one model to ``n`` questions.

    Attributes:
        scores, sizes: float64 ``[n]``, see :class:`Verdict`.
        readings: see :class:`Verdict`.
        truths: the first accepted answer to each question.
        categories: category of each question, or "".
        groups: int64 ``[n]``; questions with the same number belong together, for example those
            about one picture.
    """

    scores: np.ndarray
    sizes: np.ndarray
    readings: tuple[str, ...]
    truths: tuple[str, ...]
    categories: tuple[str, ...]
    groups: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool ``[n]``."""
        return self.scores >= RIGHT

    @functools.cached_property
    def said_yes(self) -> np.ndarray:
        """bool ``[n]``."""
        return np.asarray([r == YES for r in self.readings])

    @functools.cached_property
    def is_yes(self) -> np.ndarray:
        """bool ``[n]``: whether the truth is yes."""
        return np.asarray([t.strip().lower() == YES for t in self.truths])

    @functools.cached_property
    def whole_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """For each group: 1 if all its answers are right, else 0; and its first question."""
        _, first, code = np.unique(self.groups, return_index=True, return_inverse=True)
        worst = np.ones(len(first))
        np.minimum.at(worst, code, self.right.astype(float))
        return worst, first

    def _rows(self, mask: np.ndarray) -> Table:
        def kept(texts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(t for t, keep in zip(texts, mask, strict=True) if keep)

        return Table(
            self.scores[mask],
            self.sizes[mask],
            kept(self.readings),
            kept(self.truths),
            kept(self.categories),
            self.groups[mask],
        )

    @functools.cached_property
    def by_category(self) -> dict[str, tuple[np.ndarray, Table]]:
        """Category -> mask of its questions, bool ``[n]``, and their table; sorted by name."""
        names = np.asarray(self.categories, object)
        masks = {c: names == c for c in sorted(set(self.categories))}
        return {c: (mask, self._rows(mask)) for c, mask in masks.items()}


# The score of a table with the weight of each question, float64 [n].
Score = Callable[[Table, np.ndarray], float]
Metrics = dict[str, float]


def table_of(verdicts: Sequence[Verdict], questions: Iterable) -> Table:
    """The table of verdicts, with the questions' truths, categories and groups."""
    questions = list(questions)
    numbers: dict[str, int] = {}
    return Table(
        np.asarray([v.score for v in verdicts], np.float64),
        np.asarray([v.size for v in verdicts], np.float64),
        tuple(v.reading for v in verdicts),
        tuple(q.answers[0] if q.answers else "" for q in questions),
        tuple(q.category for q in questions),
        np.asarray([numbers.setdefault(q.group, len(numbers)) for q in questions], np.int64),
    )


def once(table: Table) -> np.ndarray:
    """Weights of 1."""
    return np.ones(len(table.scores))


def percent(table: Table, weights: np.ndarray) -> float:
    """The mean score, out of 100."""
    return 100 * mean(table.scores, weights)


def thousand(table: Table, weights: np.ndarray) -> float:
    """The mean score, out of 1000."""
    return 1000 * mean(table.scores, weights)


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted mean; 0 if all weights are 0."""
    total = weights.sum()
    return float(values @ weights / total) if total else 0.0


def circular(table: Table, weights: np.ndarray) -> float:
    """Percentage of groups with all answers right: MMBench's rotated options."""
    right, first = table.whole_groups
    return 100 * mean(right, weights[first])


def mme_category(table: Table, weights: np.ndarray) -> tuple[float, float]:
    """Accuracy, and accuracy+ (pictures with both answers right), each out of 100."""
    return percent(table, weights), circular(table, weights)


def mme(table: Table, weights: np.ndarray) -> float:
    """The sum of accuracy and accuracy+ over all categories, at most 2800."""
    return sum(sum(mme_category(rows, weights[mask])) for mask, rows in table.by_category.values())


def pope(table: Table, weights: np.ndarray) -> float:
    """F1 of "yes", out of 100."""
    return pope_metrics(table, weights)["f1"]


def perplexity(table: Table, weights: np.ndarray) -> float:
    """exp of the mean loss per token."""
    return float(np.exp((table.scores * weights).sum() / (table.sizes * weights).sum()))


def category_means(table: Table, score: Score = percent) -> Metrics:
    """The score of each category, as ``category/NAME``; empty for a single category."""
    parts = table.by_category
    if len(parts) == 1:
        return {}
    return {f"category/{name}": score(rows, once(rows)) for name, (_, rows) in parts.items()}


def circular_metrics(table: Table) -> Metrics:
    """Scores by category, and the accuracy over single questions."""
    return {"accuracy": percent(table, once(table)), **category_means(table, circular)}


def mme_metrics(table: Table) -> Metrics:
    """``perception`` and ``cognition``, ``acc/CATEGORY`` and ``acc_plus/CATEGORY``."""
    out: Metrics = {}
    sums = dict.fromkeys(MME_PARTS, 0.0)
    for name, (_, rows) in table.by_category.items():
        acc, plus = mme_category(rows, once(rows))
        out |= {f"acc/{name}": acc, f"acc_plus/{name}": plus}
        for part, names in MME_PARTS.items():
            sums[part] += acc + plus if name in names else 0.0
    return sums | out


def pope_metrics(table: Table, weights: np.ndarray) -> Metrics:
    """Accuracy, precision, recall, F1 and the rate of "yes", each out of 100."""
    yes, true = table.said_yes, table.is_yes
    hits = weights[yes & true].sum()
    said, there, total = weights[yes].sum(), weights[true].sum(), weights.sum()
    precision, recall = _ratio(hits, said), _ratio(hits, there)
    return {
        "accuracy": _ratio(weights[yes == true].sum(), total),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall) / 100,
        "yes_ratio": _ratio(said, total),
    }


def pope_details(table: Table) -> Metrics:
    """The metrics of all questions, and of each named split as ``SPLIT/NAME``."""
    out = pope_metrics(table, once(table))
    for split, (_, rows) in table.by_category.items():
        out |= {f"{split}/{k}": x for k, x in pope_metrics(rows, once(rows)).items() if split}
    return out


def _ratio(part: float, whole: float) -> float:
    return float(100 * part / whole) if whole else 0.0


def perplexity_metrics(table: Table) -> Metrics:
    """The loss per token in nats, and the number of tokens."""
    tokens = table.sizes.sum()
    return {"nats_per_token": float(table.scores.sum() / tokens), "tokens": float(tokens)}


def ocrbench_metrics(table: Table) -> Metrics:
    """Right answers by category, and their sum over the six published as text recognition."""
    parts = table.by_category.items()
    out = {f"category/{name}": float(rows.scores.sum()) for name, (_, rows) in parts}
    recognised = [rows.scores.sum() for name, (_, rows) in parts if name in TEXT_RECOGNITION]
    return {"text_recognition": float(sum(recognised)), **out} if recognised else out
