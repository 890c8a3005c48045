"""Pictures for the demo tasks: letter-spaced text, and shapes on a 3x3 grid.

Each picture comes with labels of its cells: where a cell is and what it shows (``CELL_CLASSES``).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 84
CELL = SIZE // 3
PITCH = 14  # width per letter
SCALE = 2  # supersampling factor for shapes

# (pip package, module, file in it): upright fonts under the OFL or the Apache licence.
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
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
CODE_LETTERS = "ACDEFGHJKLMNPQRTUVWXY"  # without letters that look like digits
GLYPHS = LETTERS + DIGITS + CODE_LETTERS
GLYPH_SLOTS = CELL // PITCH
# Number of classes of each label of a grid cell: column, row, shape, colour, left glyph, right
# glyph; class 0 is none.
CELL_CLASSES = (4, 4, len(SHAPES) + 1, len(COLORS) + 1, *[len(GLYPHS) + 1] * GLYPH_SLOTS)


@dataclass(frozen=True)
class Item:
    """One shape of a scene, in a cell of the 3x3 grid."""

    shape: str
    color: str
    col: int
    row: int

    @property
    def name(self) -> str:
        """Colour and shape, as in questions and answers."""
        return f"{self.color} {self.shape}"


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


def _background(rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Return a plain colour, and whether it is dark."""
    dark = rng.random() < 0.4
    low, high = (8, 48) if dark else (218, 252)
    return rng.integers(low, high, 3), bool(dark)


def _finish(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    level = int(rng.integers(2, 9))
    noise = rng.integers(-level, level + 1, (SIZE, SIZE, 3), dtype=np.int16)
    return np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)


def _no_cells() -> np.ndarray:
    """Return the labels of an empty picture's cells: their positions only."""
    cells = np.zeros((9, len(CELL_CLASSES)), np.int32)
    cells[:, 0], cells[:, 1] = np.arange(9) % 3 + 1, np.arange(9) // 3 + 1
    return cells


def render_text(text: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a short letter-spaced string, as on a number plate; return the image and its cells."""
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


def render_scene(items: list[Item], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw shapes into their grid cells, with jitter in position, size and colour; return the image
    and its cells."""
    background, _ = _background(rng)
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    cells = _no_cells()
    for item in items:
        r = rng.uniform(7.5, 11.0)
        free = CELL / 2 - 1.2 * r
        x, y = ((c + 0.5) * CELL + rng.uniform(-1, 1) * (free + 1) for c in (item.col, item.row))
        ink = np.clip(np.array(COLORS[item.color]) + rng.integers(-18, 19, 3), 0, 255)
        _draw_shape(draw, item.shape, x * SCALE, y * SCALE, r * SCALE, tuple(ink.tolist()))
        labels = SHAPES.index(item.shape) + 1, list(COLORS).index(item.color) + 1
        cells[3 * item.row + item.col, 2:4] = labels
    return _finish(image.reduce(SCALE), rng), cells
