"""Fingerprints of calibration data: hashes of pictures and questions, which a checkpoint stores and
evaluation compares with its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from mquant_jax.models.images import load_image
from mquant_jax.samples import BUNDLED_CALIBRATION, Sample, read_samples

REPORTED = "calibration"  # the key in report.json
_SIDE, _FREQUENCIES = 32, 16
# Of 255 bits. 95 % of the bundled pictures stay within it when resized and recompressed. None of
# the held-out set is that near to one of the calibration set, though all show a few flat shapes.
NEAR = 32


def picture_hash(image: Any, name: str) -> str:
    """A perceptual hash, 64 hexadecimal digits: nearly equal for a picture that was resized or
    compressed again.

    The grey picture is shrunk to 32 x 32; each bit says whether one of the 255 lowest frequencies
    of its cosine transform, the mean excluded, is above their median.

    Args:
        image: whatever :func:`mquant_jax.models.images.load_image` takes.
        name: what error messages call it.

    Raises:
        ImageError: the picture cannot be read.
    """
    grey = load_image(image, name).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    waves = dctn(np.asarray(grey, np.float64), norm="ortho")[:_FREQUENCIES, :_FREQUENCIES]
    lowest = waves.ravel()[1:]
    return np.packbits(lowest > np.median(lowest)).tobytes().hex()


def question_hash(question: str) -> str:
    """16 hexadecimal digits; case and blanks do not count."""
    text = " ".join(question.casefold().split())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprints(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """``{"pictures": [...], "questions": [...]}`` of samples, each hash once, sorted.

    Raises:
        ImageError: a picture cannot be read.
    """
    samples = list(samples)
    pictures = {picture_hash(image, s.where or "image") for s in samples for image in s.images}
    questions = {question_hash(s.question) for s in samples}
    return {"pictures": sorted(pictures), "questions": sorted(questions)}


def calibration_fingerprints(path: Path | None, limit: int | None) -> dict[str, list[str]]:
    """:func:`fingerprints` of a calibration file; ``None``: of the bundled one.

    Raises:
        UserError: see :func:`mquant_jax.samples.read_samples`.
    """
    return fingerprints(read_samples(path or BUNDLED_CALIBRATION, limit))


def near(hashes: Sequence[str], known: Sequence[str], most: int = NEAR) -> list[bool]:
    """Return which of the picture hashes differ from a known one in ``most`` bits or fewer."""
    if not known:
        return [False] * len(hashes)
    theirs = _bits(known)
    return [int(np.bitwise_count(theirs ^ row).sum(1).min()) <= most for row in map(_row, hashes)]


def _bits(hashes: Sequence[str]) -> np.ndarray:
    """uint8 ``[n, 32]``."""
    return np.stack([_row(h) for h in hashes])


def _row(digits: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), np.uint8)
