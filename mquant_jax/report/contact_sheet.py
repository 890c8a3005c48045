"""Draw a PNG of pictures with their questions and answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _GOOD, _BAD, _PAPER = (30, 30, 36), (0, 110, 60), (190, 30, 30), (252, 252, 250)
_CELL, _PICTURE, _LINE, _MARGIN = 236, 168, 17, 12


@dataclasses.dataclass(frozen=True)
class Card:
    """One cell: a picture, its question, the expected answer and each model's answer."""

    image: np.ndarray
    question: str
    expected: str
    answers: dict[str, str]


def contact_sheet(cards: Sequence[Card], path: Path, title: str, columns: int = 4) -> None:
    """Draw the cards in a grid; right answers in green, wrong ones in red."""
    columns = min(columns, len(cards))
    lines = 2 + len(cards[0].answers)
    height = _PICTURE + 2 * _MARGIN + lines * _LINE
    rows = -(-len(cards) // columns)
    sheet = Image.new("RGB", (columns * _CELL + _MARGIN, rows * height + 44), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, ImageFont.load_default(17))
    for i, card in enumerate(cards):
        x, y = _MARGIN + (i % columns) * _CELL, 44 + (i // columns) * height
        _draw_card(sheet, draw, card, x, y)
    sheet.save(path)


def _draw_card(sheet, draw, card: Card, x: int, y: int) -> None:
    font = ImageFont.load_default(13)
    picture = Image.fromarray(card.image).resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y))
    y += _PICTURE + 5
    draw.text((x, y), _fit(draw, card.question, font), _INK, font)
    draw.text((x, y + _LINE), f"expected: {card.expected}", _INK, font)
    for i, (name, answer) in enumerate(card.answers.items(), 2):
        colour = _GOOD if answer.strip() == card.expected.strip() else _BAD
        draw.text((x, y + i * _LINE), _fit(draw, f"{name}: {answer}", font), colour, font)


def _fit(draw, text: str, font) -> str:
    text = text.replace("\n", " ")
    while draw.textlength(text, font) > _CELL - _MARGIN and len(text) > 1:
        text = text[:-2].rstrip() + "…"
    return text
