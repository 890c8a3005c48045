"""Multiple-choice benchmarks. The prompts are lmms-eval's and MMMU's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mquant_jax.eval import choices, scoring
from mquant_jax.eval.question import LETTER, SHORT_ANSWER, Fields, Question, Task, with_options
from mquant_jax.eval.scoring import Verdict

_PLACE = re.compile(r"<image (\d+)>")
_MMMU_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+")
_ROTATIONS = 1_000_000  # MMBench: the indices of one question's rows differ by multiples of this


def _judge(answer: str, question: Question) -> Verdict:
    return Verdict(*choices.choice_or_text(answer, question.answers[0], question.choices))


def _mmmu(answer: str, question: Question) -> Verdict:
    if not question.choices:
        return Verdict(choices.mmmu_open_match(answer, list(question.answers)), answer)
    letter = choices.mmmu_option(answer, question.choices) or ""
    return Verdict(float(letter in question.answers), letter)


def _ask_mmmu(fields: Fields) -> str:
    return with_options(fields) + (LETTER if fields.choices else SHORT_ANSWER)


def _ask(fields: Fields) -> str:
    return with_options(fields) + (LETTER if fields.choices else "")


def _mmmu_category(raw: Mapping[str, Any]) -> str:
    """The subject: a column in TSV files, part of the id in parquet files."""
    found = _MMMU_ID.fullmatch(str(raw.get("id", "")))
    return str(raw.get("category") or (found.group(1) if found else ""))


def place_pictures(fields: Fields, text: str) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Put pictures where the text has ``<image N>``; pictures without a mark come first."""
    pieces = _PLACE.split(text)
    named = [int(n) - 1 for n in pieces[1::2]]
    if not named or not all(0 <= n < len(fields.images) for n in named):
        return [], fields.images
    order = [i for i in range(len(fields.images)) if i not in named]
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in order]
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts, tuple(fields.images[i] for i in order + named)


def _without_rotation(fields: Fields) -> str:
    number = int(fields.id) if fields.id.isdecimal() else None
    return fields.id if number is None else str(number % _ROTATIONS)


TASKS = (
    Task(
        "mmmu", "MMMU", "%", _mmmu, _ask_mmmu,
        arrange=place_pictures, category=_mmmu_category, rules=choices.MMMU,
    ),
    Task("mmstar", "MMStar", "%", _judge, _ask, rules=choices.VLMEVALKIT),
    Task(
        "mmbench", "MMBench, circular", "%", _judge, _ask,
        score=scoring.circular, details=scoring.circular_metrics, group=_without_rotation,
        rules=choices.VLMEVALKIT,
    ),
    Task("ai2d", "AI2D", "%", _judge, _ask, rules=choices.VLMEVALKIT),
    Task(
        "scienceqa", "ScienceQA", "%", _judge, _ask,
        category=("category", "subject"), rules=choices.VLMEVALKIT,
    ),
    Task("realworldqa", "RealWorldQA", "%", _judge, _ask, rules=choices.VLMEVALKIT),
)  # fmt: skip
