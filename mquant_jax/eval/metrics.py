"""Official metrics of one answer, 0..1, with the published text normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from mquant_jax.eval.vqa_text import normalised

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
YES, NO, OTHER = "yes", "no", "other"


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer is one of the truths, ignoring surrounding whitespace."""
    return float(answer.strip() in [t.strip() for t in truths])


def caseless_match(answer: str, truths: Sequence[str]) -> float:
    """:func:`exact_match` without case and without full stops at the end."""
    return float(_plain(answer) in [_plain(t) for t in truths])


def _plain(text: str) -> str:
    return text.strip().rstrip(".").rstrip().casefold()


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy: min(1, matches / 3) over all annotators but one, averaged over the omitted one.

    Args:
        truths: the answer of each annotator; ten in the published data sets.
    """
    said, truths = normalised(answer), [normalised(t) for t in truths]
    agreeing = truths.count(said)
    shares = [min(1.0, (agreeing - (t == said)) / 3) for t in truths]
    return sum(shares) / len(shares)


def anls(answer: str, truths: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity to the closest truth; 0 below the threshold.

    Ignores case and repeated spaces. Normalised by the length of the longer text as given.
    """
    best = max(_similarity(answer, truth) for truth in truths)
    return best if best >= threshold else 0.0


def _similarity(answer: str, truth: str) -> float:
    longest = max(len(answer.upper()), len(truth.upper()))
    distance = levenshtein(*(" ".join(x.lower().split()) for x in (answer, truth)))
    return 1 - distance / longest if longest else 1.0


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            change = diagonal + (x != y)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)
    return row[-1]


def contains(answer: str, truths: Sequence[str], formula: bool = False) -> float:
    """OCRBench: 1 if a truth is part of the answer.

    Args:
        formula: ignore spaces instead of case.
    """
    said = _ocr_text(answer, formula)
    return float(any(_ocr_text(t, formula) in said for t in truths))


def _ocr_text(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()


def relaxed_match(answer: str, truth: str) -> float:
    """ChartQA: numbers may be off by 5 % of the truth; other answers must match, ignoring case.

    A percentage counts as a fraction. A truth of zero is compared as text.
    """
    said, true = answer.strip(), truth.strip()
    x, y = _number(said), _number(true)
    if x is not None and y:
        return float(abs(x - y) / abs(y) <= RELAXED_TOLERANCE)
    return float(said.lower() == true.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mme_word(answer: str) -> str:
    """MME: ``yes`` or ``no`` if it is in the first four characters, else ``other``."""
    start = answer.strip().lower()[:4]
    return YES if YES in start else NO if NO in start else OTHER


def pope_word(answer: str) -> str:
    """POPE: ``no`` if the first sentence contains the word "no" or "not", else ``yes``."""
    sentence = answer.strip().partition(".")[0].replace(",", "")
    words = sentence.split()
    return NO if {"No", "no", "not"} & set(words) else YES
