"""Whether a model looks at the pictures: the same questions with pictures of other ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mquant_jax.errors import UserError
from mquant_jax.eval.question import Question, picture_key


def with_swapped_pictures(questions: Sequence[Question]) -> list[Question]:
    """Every question with the pictures of one that has as many, but others.

    Questions of the same pictures get the same other ones, from half-way through the list, since
    neighbours may be pages of one document. A question without a picture, or whose number of
    pictures no other has, stays as it is.

    Raises:
        UserError: not a single question gets other pictures.
    """
    keys = [tuple(map(picture_key, q.sample.images)) for q in questions]
    known = {key: q.sample.images for key, q in zip(keys, questions, strict=True) if key}
    of: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number in {len(key) for key in known}:
        alike = [key for key in known if len(key) == number]
        half = len(alike) // 2
        of |= dict(zip(alike, alike[half:] + alike[:half], strict=True))
    if all(key == of.get(key, key) for key in keys):
        raise UserError("--swap-images: no question can be given other pictures: that takes two "
                        "questions with as many, but different pictures")  # fmt: skip
    return [
        dataclasses.replace(q, sample=dataclasses.replace(q.sample, images=known[of[key]]))
        if key else q
        for key, q in zip(keys, questions, strict=True)
    ]  # fmt: skip
