"""Picture-and-question samples: the one format for calibration and evaluation data.

A JSONL file, one sample per line::

    {"image": "photos/cat.png", "question": "What animal is this?", "answer": "cat"}

``image`` (or ``images``, a list) is a path relative to the JSONL file, or the number of a row of
the array ``images`` (uint8 ``[N, H, W, 3]``) in the ``.npz`` file of the same stem beside it. A
text-only sample has neither. ``answer`` and ``task`` are optional.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mquant_jax.errors import UserError

DEMO_ASSETS = Path(__file__).parent / "assets" / "demo"
BUNDLED_CALIBRATION = DEMO_ASSETS / "calibration.jsonl"
BUNDLED_HELDOUT = DEMO_ASSETS / "heldout.jsonl"
_KEYS = {"image", "images", "question", "answer", "task"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about zero or more pictures.

    Attributes:
        images: uint8 arrays ``[H, W, 3]`` or paths.
        question: the text.
        answer: the expected answer, or "".
        task: a label to group results by, or "".
    """

    images: tuple[Any, ...]
    question: str
    answer: str = ""
    task: str = ""


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """Read a JSONL file of samples.

    Raises:
        UserError: no such file, a line that is not a sample, a picture that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSONL with image, question and answer")
    store = path.with_suffix(".npz")
    pictures = np.load(store, allow_pickle=False)["images"] if store.is_file() else None
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            samples.append(_sample(line, f"{path}:{number}", path.parent, pictures))
        if limit and len(samples) == limit:
            break
    if not samples:
        raise UserError(f"{path}: holds no samples")
    return samples


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write samples with one picture array each as ``path`` and its ``.npz``."""
    np.savez_compressed(path.with_suffix(".npz"), images=np.stack([s.images[0] for s in samples]))
    lines = [
        json.dumps({"image": i, "question": s.question, "answer": s.answer, "task": s.task})
        for i, s in enumerate(samples)
    ]
    path.write_text("\n".join(lines) + "\n")


def _sample(line: str, where: str, folder: Path, pictures: np.ndarray | None) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not valid JSON: {e}") from e
    if not isinstance(row, dict) or "question" not in row:
        raise UserError(f'{where}: expected an object with "question" (and "image", "answer")')
    if unknown := set(row) - _KEYS:
        raise UserError(f"{where}: unknown key {sorted(unknown)[0]!r}; known: {sorted(_KEYS)}")
    refs = row.get("images", [row["image"]] if "image" in row else [])
    images = tuple(_picture(ref, where, folder, pictures) for ref in refs)
    return Sample(images, row["question"], row.get("answer", ""), row.get("task", ""))


def _picture(ref: Any, where: str, folder: Path, pictures: np.ndarray | None) -> Any:
    if isinstance(ref, str):
        path = folder / ref
        if not path.is_file():
            raise UserError(f"{where}: no such picture: {path}")
        return path
    if isinstance(ref, int) and pictures is not None and 0 <= ref < len(pictures):
        return pictures[ref]
    raise UserError(f"{where}: image {ref!r} is neither a path nor a row of the .npz beside it")
