"""Text normalisation of the VQA challenge (EvalAI's processor).

Convert to lower case; remove commas and question marks; split off the possessive; remove
punctuation next to a space and replace it by a space elsewhere; remove full stops unless a digit
follows; turn number words up to ten into digits; remove articles; restore the apostrophes of
contractions.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
            "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
            "ten": "10"}  # fmt: skip
# Also recognised with one of their apostrophes missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _misspelt(word: str) -> list[str]:
    """The word without one of its apostrophes, for each of them."""
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


_SPELLING = {wrong: word for word in _CONTRACTIONS for wrong in _misspelt(word)}
_SPELLING["somebody'd"] = "somebodyd"  # as published


def normalised(answer: str) -> str:
    """The answer, normalised for comparison."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space else " ")
    return _FULL_STOP.sub("", out)
