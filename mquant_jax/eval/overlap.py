"""Overlap between a checkpoint's calibration data and its evaluation data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.manifest import REPORT
from mquant_jax.eval.question import Question
from mquant_jax.files import read_json_if_any
from mquant_jax.ptq.fingerprints import REPORTED, near, picture_hash, question_hash

Overlap = dict[str, int]
_KINDS = (("pictures", 64), ("questions", 16))  # and the hexadecimal digits of their hashes


class Fingerprints:
    """Hashes of a task's questions and pictures, computed on first use.

    Args:
        questions: pictures that they share are hashed once.
    """

    def __init__(self, questions: Sequence[Question]):
        self.questions = questions
        self._pictures: dict[int, str] | None = None

    def overlap(self, known: Mapping[str, Sequence[str]]) -> Overlap:
        """Count the questions whose text or pictures are in calibration data.

        Args:
            known: fingerprints of the calibration data.

        Returns:
            ``{"pictures", "questions", "both"}``: the number of questions whose picture, text, or
            both, are in the calibration data.

        Raises:
            ImageError: a picture cannot be read.
        """
        hashes = self._hashes()
        alike = dict(zip(hashes, near(list(hashes.values()), known["pictures"]), strict=True))
        texts = set(known["questions"])
        seen = [any(alike[id(image)] for image in q.sample.images) for q in self.questions]
        asked = [question_hash(q.sample.question) in texts for q in self.questions]
        both = [a and b for a, b in zip(seen, asked, strict=True)]
        return {"pictures": sum(seen), "questions": sum(asked), "both": sum(both)}

    def _hashes(self) -> dict[int, str]:
        """``id`` of a picture -> its hash."""
        if self._pictures is None:
            images = {id(i): (i, q.sample.where) for q in self.questions for i in q.sample.images}
            self._pictures = {key: picture_hash(i, where) for key, (i, where) in images.items()}
        return self._pictures


def calibration_of(folder: Path) -> Mapping[str, Any] | None:
    """The fingerprints in a checkpoint's report.json; ``None`` if there are none."""
    known = read_json_if_any(folder / REPORT).get(REPORTED)
    return known if isinstance(known, dict) and all(_hashes(known, *k) for k in _KINDS) else None


def _hashes(known: Mapping[str, Any], name: str, digits: int) -> bool:
    """Whether ``known[name]`` is a list of hashes; an edited file may hold anything."""
    found = known.get(name)
    return isinstance(found, list) and all(
        isinstance(h, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", h) for h in found
    )
