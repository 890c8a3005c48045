"""Test whether a model uses the pictures: ask the same questions with other pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mquant_jax.errors import UserError
from mquant_jax.eval.question import Question, picture_key


def with_swapped_pictures(questions: Sequence[Question]) -> list[Question]:
    """Give every question the pictures of another one that has as many.

    Questions with the same pictures get the same new ones, taken from half-way through the list,
    because neighbours may be pages of one document. A question stays unchanged if it has no
    picture, or if no other question has as many.

    Raises:
        UserError: no question gets other pictures.
    """
    keys = [tuple(map(picture_key, q.sample.images)) for q in questions]
    known = {key: q.sample.images for key, q in zip(keys, questions, strict=True) if key}
    of: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number in {len(key) for key in known}:
        alike = [key for key in known if len(key) == number]
        half = len(alike) // 2
        of |= dict(zip(alike, alike[half:] + alike[:half], strict=True))
    if all(key == of.get(key, key) for key in keys):
        raise UserError("--swap-images: no pictures can be swapped; the data need two questions "
                        "with different pictures, the same number of each")  # fmt: skip
    return [
        dataclasses.replace(q, sample=dataclasses.replace(q.sample, images=known[of[key]]))
        if key else q
        for key, q in zip(keys, questions, strict=True)
    ]  # fmt: skip
