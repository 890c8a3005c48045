"""A self-contained HTML page of the answers that changed between models."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mquant_jax.models.images import load_image
from mquant_jax.report.html import data_url, page, table

_SIDE = 320  # pixels of a picture's longer side
_STYLE = """
.card{display:flex;gap:1rem;border:1px solid #ccc;border-radius:6px;padding:1rem;margin:1rem 0;
background:#fff}.card img{max-width:20rem;height:auto;display:block;image-rendering:auto}
.q{white-space:pre-wrap;font-weight:600;overflow-wrap:anywhere}dt{color:#555}
dd{margin:0 0 .4rem;white-space:pre-wrap;overflow-wrap:anywhere}
.right{color:#0b5394}.right::before{content:"\\2713  "}
.wrong{color:#a63c00}.wrong::before{content:"\\2717  "}
"""


@dataclasses.dataclass(frozen=True)
class Flip:
    """A question that one model answered right and another wrong.

    Attributes:
        id, question, expected: the question's id, text and accepted answers.
        images: anything that :func:`mquant_jax.models.images.load_image` accepts.
        answers: ``(model, answer, right)`` for each model shown.
    """

    id: str
    question: str
    expected: Sequence[str]
    images: Sequence[Any]
    answers: Sequence[tuple[str, str, bool]]


def flips_page(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    sections: dict[str, list[Flip]],
) -> str:
    """The page's HTML.

    Args:
        header, rows: the table of scores.
        sections: title -> flips.

    Raises:
        ImageError: a picture cannot be read.
    """
    parts = [table(header, rows)]
    for name, flips in sections.items():
        parts.append(f"<h2>{html.escape(name)} ({len(flips)})</h2>")
        parts += [_card(flip) for flip in flips] or ["<p>None.</p>"]
    return page(title, parts, _STYLE)


def _card(flip: Flip) -> str:
    pictures = "".join(
        f'<img alt="picture {i} of question {html.escape(flip.id)}" src="{_url(image, flip.id)}">'
        for i, image in enumerate(flip.images, 1)
    )
    said = "".join(
        f'<dt>{html.escape(name)}</dt><dd class="{"right" if right else "wrong"}">'
        f"{html.escape(text) or '(empty)'}</dd>"
        for name, text, right in flip.answers
    )
    expected = html.escape(" | ".join(dict.fromkeys(flip.expected)))
    return (
        f'<div class="card"><div>{pictures}</div><div><p class="q">{html.escape(flip.question)}</p>'
        f"<dl><dt>expected</dt><dd>{expected}</dd>{said}</dl>"
        f"<small>question {html.escape(flip.id)}</small></div></div>"
    )


def _url(image: Any, name: str) -> str:
    """The picture as a ``data:`` URL; large ones are downscaled."""
    picture = load_image(image, f"question {name}")
    small = max(picture.size) <= _SIDE
    if not small:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "PNG" if small else "JPEG")
    return data_url(out.getvalue(), "png" if small else "jpeg")
