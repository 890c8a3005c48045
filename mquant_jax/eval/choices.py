"""The option that an answer to a multiple-choice question names, by published rules alone.

Where a benchmark's own evaluation asks another model to read the answer, :func:`infer_option` takes
its place: VLMEvalKit's exact matching. MMMU has rules of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mquant_jax.eval.metrics import caseless_match

VLMEVALKIT = "option letter or text by VLMEvalKit's exact matching; no judge model"
MMMU = "MMMU's parsing of options and open answers; an answer without an option is wrong"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5
_SENTENCE = 3  # in longer answers a capital A may be the article
_LONG_ANSWER = 5  # words; MMMU looks for an option's text in longer answers only


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that the answer names, or the option whose text it holds.

    Args:
        choices: letter -> text.

    Returns:
        A letter; ``None`` for a refusal, none or several.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    return _letter(answer, choices) or _by_text(answer, choices)


def _letter(answer: str, choices: Mapping[str, str]) -> str | None:
    words = answer.translate(_MARKS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) != 1 or ("A" in words and len(words) > _SENTENCE):
        return None
    return found[0] if words.index(found[0]) > len(words) - _LAST_WORDS else None


def _by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    said = answer.lower()
    found = [letter for letter, text in choices.items() if text and text.lower() in said]
    return found[0] if len(found) == 1 else None


def mmmu_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """MMMU: the last option named as ``(A)``, else as a word, else as ``A.``; in answers of more
    than five words else the last whose text occurs.

    MMMU draws an option at random where none is found; here it is ``None``, which is wrong.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    said = f" {answer} "
    for form in ("({})", " {} ", " {}."):
        if found := _last({letter: said.rfind(form.format(letter)) for letter in choices}):
            return found
    if len(said.split()) <= _LONG_ANSWER:
        return None
    lower = said.lower()
    return _last({letter: lower.rfind(text.lower()) for letter, text in choices.items() if text})


def _last(positions: Mapping[str, int]) -> str | None:
    """The letter that comes last; ``None`` where no position is 0 or more."""
    found = {letter: at for letter, at in positions.items() if at >= 0}
    return max(found, key=lambda letter: found[letter]) if found else None


def choice_or_text(answer: str, truth: str, choices: Mapping[str, str]) -> tuple[float, str]:
    """Score and reading of an answer to a question that may or may not have options."""
    if choices:
        letter = infer_option(answer, choices) or ""
        return float(letter == truth), letter
    return caseless_match(answer, [truth]), answer.strip()


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_open_match(answer: str, truths: list[str]) -> float:
    """MMMU: 1 if a truth is one of the numbers of an open answer, or part of its key sentences."""
    wanted = [value for truth in truths for value in _values(truth)]
    texts = [value for value in wanted if isinstance(value, str)]
    said = _open_values(answer)
    hits = (any(t in v for t in texts) if isinstance(v, str) else v in wanted for v in said)
    return float(any(hits))


def _open_values(answer: str) -> list[str | float]:
    lines = re.split(r"\.\s(?=[A-Z])|\n", answer.strip().strip(".").lower())
    keys = [_key(line, last=i == len(lines) - 1) for i, line in enumerate(lines)]
    found = [key for key in keys if key] or ["\n".join(lines)]
    numbers = [n for key in found for pattern in _NUMBERS for n in pattern.findall(key)]
    return [value for text in (*found, *numbers) for value in _values(text)]


def _key(line: str, last: bool) -> str:
    """The shortest text behind an indicator of the answer; "" where there is none."""
    marks = (*_INDICATORS, "=") if last else _INDICATORS
    behind = [line.split(mark)[-1].strip() for mark in marks if mark in line]
    key = min((text for text in behind if text), key=len, default="")
    return "" if key in _TRIVIAL else key


def _values(text: str) -> list[str | float]:
    """A number rounded to two places, or the text; a single letter with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
