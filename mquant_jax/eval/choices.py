"""Parse the option chosen in an answer to a multiple-choice question, by published rules only.

Some benchmarks ask a judge model to parse the answer. :func:`infer_option` replaces the judge with
VLMEvalKit's exact matching. MMMU has its own rules.
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
_LONG_ANSWER = 5  # words; MMMU searches only longer answers for an option's text


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The option that the answer gives by letter, or by its text.

    Args:
        choices: letter -> text.

    Returns:
        A letter; ``None`` for a refusal and for none or several options.
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
    """MMMU: the last option given as ``(A)``, else as a word, else as ``A.``; in answers of more
    than five words else the last option whose text occurs.

    If there is none, MMMU draws an option at random; this returns ``None``, which counts as wrong.
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
    """The letter with the largest position; ``None`` if every position is negative."""
    found = {letter: at for letter, at in positions.items() if at >= 0}
    return max(found, key=lambda letter: found[letter]) if found else None


def choice_or_text(answer: str, truth: str, choices: Mapping[str, str]) -> tuple[float, str]:
    """Score and parsed value of an answer to a question with or without options."""
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
    """MMMU: 1 if a truth is a number in an open answer or part of its key sentences."""
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
    """The shortest text that follows an indicator of the answer; "" without one."""
    marks = (*_INDICATORS, "=") if last else _INDICATORS
    after = [line.split(mark)[-1].strip() for mark in marks if mark in line]
    key = min((text for text in after if text), key=len, default="")
    return "" if key in _TRIVIAL else key


def _values(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text; a single letter gets a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
