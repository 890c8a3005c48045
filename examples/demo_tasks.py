"""Small visual questions with exact answers, generated on the fly.

The demo model is trained and evaluated on these tasks. Each sample is an 84x84 picture, a short
question and a short answer:

- ``read``: type the word, number or code in the picture;
- ``shape`` / ``color``: name one shape, or its colour;
- ``count``: how many shapes of a kind;
- ``relation``: where shapes lie relative to one another.

Training and held-out samples are disjoint by construction: the content of a picture (the string, or
the scene's shapes, colours and grid cells) is hashed, and the hash decides the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from examples.demo_pictures import (
    CODE_LETTERS,
    COLORS,
    DIGITS,
    LETTERS,
    SHAPES,
    Item,
    render_scene,
    render_text,
)

HELDOUT_SHARE = 0.1
PLURALS = {s: s + ("es" if s.endswith("ss") else "s") for s in SHAPES}
DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiouy"
CODE_DIGITS = "23456789"

# All words with a token of their own; pictures never show any of these.
QUESTION_WORDS = (
    "user assistant read what does the word number code say is shape color a how many are there"
    " count left right of above below yes no"
).split()
VOCABULARY = frozenset([*QUESTION_WORDS, *COLORS, *SHAPES, *PLURALS.values()])

TRAIN_WEIGHTS = {"read": 0.4, "shape": 0.1, "color": 0.15, "count": 0.17, "relation": 0.18}
EVAL_WEIGHTS = {"read": 0.45, "shape": 0.1, "color": 0.1, "count": 0.15, "relation": 0.2}


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        image: uint8 ``[84, 84, 3]``.
        question: The user's text.
        answer: The exact expected answer.
        task: Name of the task.
        key: Content of the picture; ``split_of(key)`` is the sample's split.
        cells: int32 ``[9, 6]``, where each cell of the 3x3 grid is and what it shows (see
            ``demo_pictures.CELL_CLASSES``): extra training labels, not an input of the model.
    """

    image: np.ndarray
    question: str
    answer: str
    task: str
    key: str
    cells: np.ndarray


def split_of(key: str) -> str:
    """Return the split of a picture's key; single glyphs are for training only."""
    if key.startswith("read:") and len(key) <= len("read:") + 1:
        return "train"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def _choice(rng: np.random.Generator, options: str | tuple | list):
    return options[int(rng.integers(len(options)))]


def _pseudo_word(rng: np.random.Generator, length: int) -> str:
    if rng.random() < 0.5:
        return "".join(_choice(rng, LETTERS) for _ in range(length))
    start = int(rng.integers(2))
    return "".join(_choice(rng, CONSONANTS if (i + start) % 2 else VOWELS) for i in range(length))


def _text(rng: np.random.Generator, kind: str, difficulty: float) -> str:
    if rng.random() >= (difficulty - 0.1) / 0.4:
        length = 1
    elif kind == "code":
        length = 3
    else:
        low, high = (3, 5) if kind == "word" else (2, 4)
        if rng.random() >= (difficulty - 0.3) / 0.5:
            low, high = 2, 3
        length = int(rng.integers(low, high + 1))
    if kind == "number":
        return "".join(_choice(rng, DIGITS) for _ in range(length))
    if kind == "word":
        return _pseudo_word(rng, length)
    digits = rng.permutation(length) < rng.integers(1, max(2, length))
    return "".join(_choice(rng, CODE_DIGITS if d else CODE_LETTERS) for d in digits)


def _read(rng: np.random.Generator, split: str, difficulty: float) -> Sample:
    kind = ("word", "number", "code")[int(np.searchsorted([0.4, 0.7], rng.random()))]
    while True:
        text = _text(rng, kind, difficulty)
        key = f"read:{text}"
        if text not in VOCABULARY and split_of(key) == split:
            break
    question = _choice(rng, (f"read the {kind}", f"what does the {kind} say?"))
    image, cells = render_text(text, rng)
    return Sample(image, question, text, "read", key, cells)


def _cells(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    return [(int(c) % 3, int(c) // 3) for c in rng.permutation(9)[:n]]


def _scene(rng: np.random.Generator, n: int) -> list[Item]:
    """Return ``n`` items with different shapes and different colours."""
    shapes, colors = rng.permutation(len(SHAPES)), rng.permutation(len(COLORS))
    names = list(COLORS)
    return [
        Item(SHAPES[shapes[i]], names[colors[i]], *cell) for i, cell in enumerate(_cells(rng, n))
    ]


Draft = tuple[list[Item], str, str]  # items, question, answer


def _shape(rng: np.random.Generator, difficulty: float) -> Draft:
    items = _scene(rng, 1 if rng.random() >= difficulty else int(rng.integers(1, 5)))
    if len(items) == 1 and rng.random() < 0.5:
        return items, "what shape is this?", items[0].shape
    color = items[0].color
    question = _choice(rng, (f"what shape is {color}?", f"what is the {color} shape?"))
    return items, question, items[0].shape


def _color(rng: np.random.Generator, difficulty: float) -> Draft:
    items = _scene(rng, 1 if rng.random() >= difficulty else int(rng.integers(1, 5)))
    shape = items[0].shape
    question = _choice(rng, (f"what color is the {shape}?", f"the {shape} is what color?"))
    return items, question, items[0].color


def _count(rng: np.random.Generator, difficulty: float) -> Draft:
    n = int(rng.integers(1, 7 if difficulty >= 0.3 else 4))
    others = int(rng.integers(0, 4)) if rng.random() < difficulty else 0
    shape, color = _choice(rng, SHAPES), _choice(rng, list(COLORS))
    by_color = rng.random() < 0.4
    cells = _cells(rng, min(9, n + others))
    items = []
    for i, cell in enumerate(cells):
        kind, ink = shape, color if by_color else _choice(rng, list(COLORS))
        if i >= n and by_color and rng.random() < 0.5:
            ink = _choice(rng, [c for c in COLORS if c != color])
        elif i >= n:
            kind = _choice(rng, [s for s in SHAPES if s != shape])
        items.append(Item(kind, ink, *cell))
    target = (f"{color} " if by_color else "") + PLURALS[shape]
    return items, _choice(rng, (f"how many {target}?", f"count the {target}")), str(n)


def _relation(rng: np.random.Generator, difficulty: float) -> Draft:
    n = 2 if rng.random() >= difficulty else int(rng.integers(2, 4))
    direction = _choice(rng, list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    wanted = bool(rng.random() < 0.5)
    ask_what = rng.random() < 0.5
    while True:
        items = _scene(rng, n)
        first, second = items[:2]
        side = [dx * (i.col - second.col) + dy * (i.row - second.row) for i in items]
        if ask_what and side[0] > 0 and all(s <= 0 for s in side[1:]):
            template = _choice(rng, ("what is {} the {}?", "{} the {} is what?"))
            return items, template.format(direction, second.name), first.name
        if not ask_what and side[0] != 0 and (side[0] > 0) == wanted:
            template = _choice(rng, ("is the {} {} the {}?", "{} {} {}?"))
            answer = "yes" if wanted else "no"
            return items, template.format(first.name, direction, second.name), answer


_SCENES: dict[str, Callable[[np.random.Generator, float], Draft]] = {
    "shape": _shape,
    "color": _color,
    "count": _count,
    "relation": _relation,
}


def make(rng: np.random.Generator, task: str, split: str, difficulty: float = 1.0) -> Sample:
    """Draw one sample of a given task and split."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    if split == "heldout" and difficulty < 1.0:
        raise ValueError("held-out samples are always drawn at full difficulty")
    if task == "read":
        return _read(rng, split, difficulty)
    while True:
        items, question, answer = _SCENES[task](rng, difficulty)
        key = "scene:" + ",".join(sorted(f"{i.name} {i.col}{i.row}" for i in items))
        if split_of(key) == split:
            image, cells = render_scene(items, rng)
            return Sample(image, question, answer, task, key, cells)


def sample(
    rng: np.random.Generator,
    split: str,
    difficulty: float = 1.0,
    mix: Mapping[str, float] | None = None,
) -> Sample:
    """Draw one sample of a random task, from ``mix`` or the split's own mix of tasks."""
    weights = mix or (TRAIN_WEIGHTS if split == "train" else EVAL_WEIGHTS)
    edges = np.cumsum(list(weights.values()))
    index = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return make(rng, list(weights)[min(index, len(weights) - 1)], split, difficulty)


def batch(
    rng: np.random.Generator,
    n: int,
    split: str,
    difficulty: float = 1.0,
    mix: Mapping[str, float] | None = None,
) -> list[Sample]:
    """Draw ``n`` samples."""
    return [sample(rng, split, difficulty, mix) for _ in range(n)]


def _mixed_set(n: int, split: str, seed: tuple[int, ...]) -> list[Sample]:
    """Draw ``n`` samples whose tasks follow ``EVAL_WEIGHTS`` evenly, in every prefix too."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(EVAL_WEIGHTS, 0)
    out = []
    for i in range(n):
        task = max(counts, key=lambda t: EVAL_WEIGHTS[t] * (i + 1) - counts[t])
        counts[task] += 1
        out.append(make(rng, task, split))
    return out


def eval_set(n: int = 500, seed: int = 0) -> list[Sample]:
    """Return fixed held-out samples, about 45 % of them reading."""
    return _mixed_set(n, "heldout", (seed, 0xE7A1))


def calibration_set(n: int = 64, seed: int = 0) -> list[Sample]:
    """Return fixed samples of the training split, to calibrate quantisation."""
    return _mixed_set(n, "train", (seed, 0xCA11))
