"""Small visual questions with exact answers, drawn on the fly.

The demonstration model is trained and judged on these tasks. Each sample is an 84x84 picture, a
short question and a short answer:

- ``read``: type out the word, number or code in the picture;
- ``shape`` / ``color``: name one shape, or its colour;
- ``count``: how many shapes of a kind;
- ``relation``: where shapes lie relative to one another.

Training and held-out samples are disjoint by construction. What a picture shows (the string, or
the scene's shapes, colours and grid cells) is hashed, and the hash decides the split for good.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 84
CELL = SIZE // 3
PITCH = 14  # width of one letter's place
SCALE = 2  # shapes are drawn this much larger, then averaged down
HELDOUT_SHARE = 0.1

# (pip package, module, file inside it): upright faces under the OFL or the Apache licence.
FONTS = (
    ("font-roboto", "font_roboto", "files/Roboto-Medium.ttf"),
    ("font-source-sans-pro", "font_source_sans_pro", "files/SourceSansPro-Semibold.ttf"),
    ("font-source-serif-pro", "font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf"),
    ("font-lato", "font_lato", "files/Lato-Bold.ttf"),
)

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (40, 155, 55),
    "blue": (45, 85, 225),
    "yellow": (232, 200, 20),
    "orange": (245, 130, 25),
    "purple": (130, 45, 170),
    "pink": (245, 120, 185),
    "cyan": (35, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
PLURALS = {s: s + ("es" if s.endswith("ss") else "s") for s in SHAPES}
DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiouy"
DIGITS = "0123456789"
CODE_LETTERS = "ACDEFGHJKLMNPQRTUVWXY"  # without letters that look like digits
CODE_DIGITS = "23456789"
GLYPHS = LETTERS + DIGITS + CODE_LETTERS
GLYPH_SLOTS = CELL // PITCH
# Classes of each label of a grid cell: its column and row, and what it shows: shape, colour, glyph
# on the left, glyph on the right; 0 is none.
CELL_CLASSES = (4, 4, len(SHAPES) + 1, len(COLORS) + 1, *[len(GLYPHS) + 1] * GLYPH_SLOTS)

# All words that have a token of their own; a word to be read is never one of them.
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
        key: What the picture shows; ``split_of(key)`` is the sample's split.
        cells: int32 ``[9, 6]``, where each cell of the 3x3 grid is and what it shows (see
            ``CELL_CLASSES``): a help in training that the model itself never sees.
    """

    image: np.ndarray
    question: str
    answer: str
    task: str
    key: str
    cells: np.ndarray


@dataclass(frozen=True)
class Item:
    """One shape of a scene, in a cell of the 3x3 grid."""

    shape: str
    color: str
    col: int
    row: int

    @property
    def name(self) -> str:
        """Colour and shape, as in the questions and answers."""
        return f"{self.color} {self.shape}"


def split_of(key: str) -> str:
    """Split that a picture's key belongs to; single glyphs are for training only."""
    if key.startswith("read:") and len(key) <= len("read:") + 1:
        return "train"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


@functools.cache
def _font_path(index: int) -> str:
    package, module, file = FONTS[index]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        packages = " ".join(name for name, _, _ in FONTS)
        raise ModuleNotFoundError(
            f"the demonstration tasks need the font package {package!r}; install all of them "
            f"with: pip install {packages}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in (root / file, root / Path(file).name):
        if path.exists():
            return str(path)
    raise FileNotFoundError(f"{package}: no file {file} under {root}; reinstall the package")


@functools.cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(index), size, layout_engine=ImageFont.Layout.BASIC)


def _choice(rng: np.random.Generator, options: str | tuple | list):
    return options[int(rng.integers(len(options)))]


def _background(rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Plain colour, and whether it is dark."""
    dark = rng.random() < 0.4
    low, high = (8, 48) if dark else (218, 252)
    return rng.integers(low, high, 3), bool(dark)


def _finish(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    level = int(rng.integers(2, 9))
    noise = rng.integers(-level, level + 1, (SIZE, SIZE, 3), dtype=np.int16)
    return np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)


def _no_cells() -> np.ndarray:
    """Labels of an empty picture's cells: only where they are."""
    cells = np.zeros((9, len(CELL_CLASSES)), np.int32)
    cells[:, 0], cells[:, 1] = np.arange(9) % 3 + 1, np.arange(9) // 3 + 1
    return cells


def render_text(text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a short letter-spaced string, like a number plate's: the image and its cells."""
    font = _font(int(rng.integers(len(FONTS))), int(rng.integers(19, 24)))
    background, dark = _background(rng)
    ink = tuple((rng.integers(170, 256, 3) if dark else rng.integers(0, 110, 3)).tolist())
    image = Image.new("RGB", (SIZE, SIZE), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    start = int(rng.integers(SIZE // PITCH - len(text) + 1))
    shift, baseline = rng.uniform(-2, 2), SIZE / 2 + 7 + rng.uniform(-3, 3)
    cells = _no_cells()
    for column, glyph in enumerate(text, start):
        x = (column + 0.5) * PITCH + shift
        draw.text((round(x), round(baseline)), glyph, font=font, fill=ink, anchor="ms")
        cells[3 + column * PITCH // CELL, 4 + column % GLYPH_SLOTS] = GLYPHS.index(glyph) + 1
    return _finish(image, rng), cells


def _polygon(x: float, y: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (x + r * math.sin(turn + i * step), y - r * math.cos(turn + i * step))
        for i, r in enumerate(radii)
    ]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, ink) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=round(0.42 * r))
    elif shape == "square":
        s = 0.88 * r
        draw.rectangle((x - s, y - s, x + s, y + s), fill=ink)
    elif shape == "triangle":
        draw.polygon(_polygon(x, y + 0.15 * r, [1.15 * r] * 3, 0.0), fill=ink)
    elif shape == "diamond":
        draw.polygon(
            [(x, y - 1.2 * r), (x + 0.8 * r, y), (x, y + 1.2 * r), (x - 0.8 * r, y)], fill=ink
        )
    elif shape == "star":
        draw.polygon(_polygon(x, y, [1.2 * r, 0.5 * r] * 5, 0.0), fill=ink)
    else:  # cross
        t = 0.34 * r
        draw.rectangle((x - r, y - t, x + r, y + t), fill=ink)
        draw.rectangle((x - t, y - r, x + t, y + r), fill=ink)


def render_scene(items: list[Item], rng: np.random.Generator) -> np.ndarray:
    """Draw shapes into their grid cells, with jitter in place, size and colour."""
    background, _ = _background(rng)
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    for item in items:
        r = rng.uniform(7.5, 11.0)
        free = CELL / 2 - 1.2 * r
        x, y = ((c + 0.5) * CELL + rng.uniform(-1, 1) * (free + 1) for c in (item.col, item.row))
        ink = np.clip(np.array(COLORS[item.color]) + rng.integers(-18, 19, 3), 0, 255)
        _draw_shape(draw, item.shape, x * SCALE, y * SCALE, r * SCALE, tuple(ink.tolist()))
    return _finish(image.reduce(SCALE), rng)


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
    """``n`` items with different shapes and different colours."""
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
            cells = _no_cells()
            for i in items:
                labels = SHAPES.index(i.shape) + 1, list(COLORS).index(i.color) + 1
                cells[3 * i.row + i.col, 2:4] = labels
            return Sample(render_scene(items, rng), question, answer, task, key, cells)


def sample(
    rng: np.random.Generator,
    split: str,
    difficulty: float = 1.0,
    mix: Mapping[str, float] | None = None,
) -> Sample:
    """Draw one sample of a random task: from ``mix``, or the split's own mix of tasks."""
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
    """``n`` samples whose tasks follow ``EVAL_WEIGHTS`` evenly, also in every prefix."""
    rng = np.random.default_rng(seed)
    done = dict.fromkeys(EVAL_WEIGHTS, 0)
    out = []
    for i in range(n):
        task = max(done, key=lambda t: EVAL_WEIGHTS[t] * (i + 1) - done[t])
        done[task] += 1
        out.append(make(rng, task, split))
    return out


def eval_set(n: int = 500, seed: int = 0) -> list[Sample]:
    """Fixed held-out samples, about 45 % of them reading."""
    return _mixed_set(n, "heldout", (seed, 0xE7A1))


def calibration_set(n: int = 64, seed: int = 0) -> list[Sample]:
    """Fixed samples of the training split, for choosing quantisation parameters."""
    return _mixed_set(n, "train", (seed, 0xCA11))
