"""Pictures with several short questions each, to train and to measure a small LLaVA.

Kinds of pictures:

- ``easyvqa``: the pictures and questions of the wheel ``easy-vqa``;
- ``scene``: shapes on a 3x3 grid: colours, shapes, places, relations;
- ``count``: several shapes of one kind;
- ``text``: a word, number or code;
- ``emoji``: what a colour emoji shows (npm package ``emoji-datasource-google``, unpacked).

Training and held-out pictures are disjoint by construction. easy-VQA has its own test split; of the
other pictures the content (scene, string, emoji) is hashed, and the hash decides.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

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
from examples.demo_tasks import DIRECTIONS, PLURALS, split_of

SIDE = 112
PLACES = [
    f"{row} {column}".strip().replace("middle center", "center")
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
]
Question = tuple[str, str]  # question, answer


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture and what is asked about it.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        questions: pairs of question and exact answer.
        kind: one of :data:`KINDS`.
    """

    image: np.ndarray
    questions: tuple[Question, ...]
    kind: str


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _until(split: str, draw: Callable[[], tuple[str, Callable[[], Picture]]]) -> Picture:
    """Draw contents until one belongs to ``split``; render only that one."""
    while True:
        key, render = draw()
        if split_of(key) == split:
            return render()


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _key(items: list[Item]) -> str:
    return "scene:" + ",".join(sorted(f"{i.name} {i.col}{i.row}" for i in items))


def _cells(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    return [(int(c) % 3, int(c) // 3) for c in rng.permutation(9)[:n]]


def scene(rng: np.random.Generator, split: str) -> Picture:
    """One to four shapes, all of different shape and colour."""

    def draw():
        n = int(rng.integers(1, 5))
        shapes, colors = rng.permutation(len(SHAPES)), rng.permutation(len(COLORS))
        names = list(COLORS)
        items = [
            Item(SHAPES[shapes[i]], names[colors[i]], *cell)
            for i, cell in enumerate(_cells(rng, n))
        ]
        return _key(items), lambda: Picture(
            render_scene(items, rng)[0], tuple(_scene_questions(items, rng)), "scene"
        )

    return _until(split, draw)


def _scene_questions(items: list[Item], rng: np.random.Generator) -> list[Question]:
    first, last = items[0], items[-1]
    there = {(i.shape, i.color) for i in items}
    other = _pick(rng, items).shape, _pick(rng, list(COLORS))
    questions = [
        (f"what color is the {first.shape}?", first.color),
        (f"what shape is {last.color}?", last.shape),
        (f"where is the {last.shape}?", PLACES[3 * last.row + last.col]),
        ("how many shapes are there?", str(len(items))),
        (f"is there a {first.name}?", "yes"),
        (f"is there a {other[1]} {other[0]}?", _yes(other in there)),
    ]
    if len(items) > 1:
        relation = _pick(rng, list(DIRECTIONS))
        dx, dy = DIRECTIONS[relation]
        side = dx * (first.col - last.col) + dy * (first.row - last.row)
        questions.append((f"is the {first.shape} {relation} the {last.shape}?", _yes(side > 0)))
    return questions


def counting(rng: np.random.Generator, split: str) -> Picture:
    """One to six equal shapes among up to three others."""

    def draw():
        n, others = int(rng.integers(1, 7)), int(rng.integers(0, 4))
        shape = _pick(rng, SHAPES)
        rest = [s for s in SHAPES if s != shape]
        items = [
            Item(shape if i < n else _pick(rng, rest), _pick(rng, list(COLORS)), *cell)
            for i, cell in enumerate(_cells(rng, n + others))
        ]
        color, absent = items[0].color, _pick(rng, rest)
        of_color = sum(i.color == color for i in items)
        questions = (
            (f"how many {PLURALS[shape]} are there?", str(n)),
            ("how many shapes are there?", str(len(items))),
            (f"how many shapes are {color}?", str(of_color)),
            (f"is there a {absent}?", _yes(any(i.shape == absent for i in items))),
        )
        return _key(items), lambda: Picture(render_scene(items, rng)[0], questions, "count")

    return _until(split, draw)


def text(rng: np.random.Generator, split: str) -> Picture:
    """A string of two to five characters, in one of several fonts."""

    def draw():
        kind = _pick(rng, ("number", "number", "code", "code", "word"))
        glyphs = {"number": DIGITS, "code": CODE_LETTERS + DIGITS[2:], "word": LETTERS}[kind]
        string = "".join(_pick(rng, glyphs) for _ in range(int(rng.integers(2, 5))))
        glyph = _pick(rng, glyphs)
        questions = (
            (f"read the {kind}", string),
            ("what is the first character?", string[0]),
            ("what is the last character?", string[-1]),
            ("how many characters are there?", str(len(string))),
            (f"is there a {_pick(rng, string)}?", "yes"),
            (f"is there a {glyph}?", _yes(glyph in string)),
        )
        return f"read:{string}", lambda: Picture(render_text(string, rng)[0], questions, "text")

    return _until(split, draw)


# What an emoji shows, by the beginning of its subcategory or category.
_SHOWS = {
    "animal": "animal", "cat-face": "animal", "monkey-face": "animal", "plant": "plant",
    "food-fruit": "fruit", "food-vegetable": "vegetable", "food": "food", "drink": "drink",
    "face": "face", "person": "person", "family": "person", "hand": "hand", "heart": "heart",
    "country-flag": "flag", "subdivision-flag": "flag", "flag": "flag", "clothing": "clothing",
    "transport-sign": "sign", "transport": "vehicle", "place-building": "building",
    "place-religious": "building", "musical": "instrument", "tool": "tool", "sport": "sport",
    "time": "clock", "arrow": "arrow", "zodiac": "sign", "av-symbol": "sign", "keycap": "sign",
    "alphanum": "sign", "sky": "sky",
}  # fmt: skip
_LEFT_OUT = ("1F595",)  # a rude gesture
_ARTICLE = {"animal": "an", "instrument": "an", "arrow": "an"}


@functools.cache
def _emoji(folder: Path) -> list[tuple[str, str, Path]]:
    """Code point, what it shows, and file of every emoji of a known kind."""
    out = []
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        kinds = [v for k, v in _SHOWS.items() if entry["subcategory"].startswith(k)]
        path = folder / "img" / "google" / "64" / entry["image"]
        if kinds and path.is_file() and entry["unified"] not in _LEFT_OUT:
            out.append((entry["unified"], kinds[0], path))
    return out


def emoji(rng: np.random.Generator, split: str, folder: Path) -> Picture:
    """One emoji of any size on a plain background; flags and persons are drawn less often."""
    shows = sorted({kind for _, kind, _ in _emoji(folder)})

    def draw():
        wanted = _pick(rng, shows)
        code, kind, path = _pick(rng, [e for e in _emoji(folder) if e[1] == wanted])
        other = _pick(rng, [s for s in shows if s != kind])
        questions = (
            ("what is this?", kind),
            (f"is this {_ARTICLE.get(kind, 'a')} {kind}?", "yes"),
            (f"is this {_ARTICLE.get(other, 'a')} {other}?", "no"),
        )
        return f"emoji:{code}", lambda: Picture(_pasted(path, rng), questions, "emoji")

    return _until(split, draw)


def _pasted(path: Path, rng: np.random.Generator) -> np.ndarray:
    """Put a picture with transparency on a background."""
    size = int(rng.integers(72, 109))
    with Image.open(path) as file:
        drawn = file.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
    tone = rng.integers(190, 256, 3) if rng.random() < 0.7 else rng.integers(0, 90, 3)
    image = Image.new("RGB", (SIDE, SIDE), tuple(tone.tolist()))
    corner = tuple(int(rng.integers(0, SIDE - size + 1)) for _ in range(2))
    image.paste(drawn, corner, drawn)
    return np.asarray(image)


@functools.cache
def _easyvqa(split: str) -> tuple[Path, dict[int, tuple[Question, ...]]]:
    """Folder and questions by picture of a split."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("easy-VQA is not installed; pip install easy-vqa==1.0")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    folder /= "train" if split == "train" else "test"
    out: dict[int, list[Question]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        out.setdefault(number, []).append((question, answer))
    return folder / "images", {k: tuple(v) for k, v in out.items()}


def easyvqa(rng: np.random.Generator, split: str, number: int | None = None) -> Picture:
    """A picture of easy-VQA with all its questions; its test split is the held-out one."""
    folder, questions = _easyvqa(split)
    number = int(rng.integers(len(questions))) if number is None else number
    with Image.open(folder / f"{number}.png") as file:
        image = np.asarray(file.convert("RGB"))
    return Picture(image, questions[number], "easyvqa")


KINDS: dict[str, float] = {
    "easyvqa": 0.45, "scene": 0.2, "count": 0.05, "text": 0.05, "emoji": 0.25,
}  # fmt: skip


def pictures(n: int, split: str, seed: int, emoji_folder: Path | None) -> list[Picture]:
    """Draw ``n`` pictures whose kinds follow :data:`KINDS`; without a folder, no emoji.

    Raises:
        ModuleNotFoundError: easy-VQA or a font package is not installed.
    """
    shares = {k: v for k, v in KINDS.items() if k != "emoji" or emoji_folder}
    rng = np.random.default_rng((seed, split == "train"))
    p = np.asarray(list(shares.values()))
    return [
        _draw(kind, rng, split, emoji_folder) for kind in rng.choice(list(shares), n, p=p / p.sum())
    ]


def pictures_of(
    counts: Mapping[str, int], split: str, seed: int, emoji_folder: Path
) -> list[Picture]:
    """Draw so many pictures of each kind, in turn as far as they reach, all different."""
    rng = np.random.default_rng((seed, split == "train"))
    out: list[Picture] = []
    seen: set[bytes] = set()
    for i in range(max(counts.values())):
        for kind in (k for k, n in counts.items() if i < n):
            while (picture := _draw(kind, rng, split, emoji_folder)).image.tobytes() in seen:
                pass
            seen.add(picture.image.tobytes())
            out.append(picture)
    return out


def _draw(kind: str, rng: np.random.Generator, split: str, emoji_folder: Path | None) -> Picture:
    if kind == "emoji":
        return emoji(rng, split, emoji_folder)
    return {"easyvqa": easyvqa, "scene": scene, "count": counting, "text": text}[kind](rng, split)
