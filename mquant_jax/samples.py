"""Samples of pictures, question and answer: the format of calibration and evaluation data.

A JSONL file in UTF-8, one sample per line, in any of three formats::

    {"image": "photos/cat.png", "question": "What animal is this?", "answer": "cat"}
    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                           {"from": "gpt", "value": "cat"}]}
    {"images": ["cat.png"], "messages": [{"role": "user", "content": "<image>What is it?"},
                                         {"role": "assistant", "content": "cat"}]}

``image`` (or ``images``, a list) is a path relative to the JSONL file, a picture in base64 (plain
or as a ``data:`` URL), or the index of a row of the array ``images`` (uint8 ``[N, H, W, 3]``) in
the ``.npz`` file of the same name next to it. A text-only sample has neither, or null. ``answer``
(text or a number) and ``task`` are optional. The last answer of a conversation is the expected one.
Other keys are ignored with a warning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mquant_jax.cli_support import warn
from mquant_jax.errors import UserError
from mquant_jax.files import read_bytes
from mquant_jax.sample_rows import Row, RowReader
from mquant_jax.validate import count
from mquant_jax.validate import path as checked_path

DEMO_ASSETS = Path(__file__).parent / "assets" / "demo"
BUNDLED_CALIBRATION = DEMO_ASSETS / "calibration.jsonl"
BUNDLED_HELDOUT = DEMO_ASSETS / "heldout.jsonl"
_MOST_BYTES = 4 << 30  # limit of a JSONL file, including pictures in base64
_LISTED, _LONGEST = (
    10,
    160,
)  # bad samples that an error names, characters of each  # bad samples that an error message names
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about zero or more pictures.

    Attributes:
        images: anything that :func:`mquant_jax.models.images.load_image` accepts: arrays, paths,
            bytes.
        question: the question; for a conversation, that of the last turn.
        answer: the expected answer, or "".
        task: a label to group results by, or "".
        messages: the conversation up to the answer, if it is more than one plain question.
        where: file and line, for error messages.
    """

    images: tuple[Any, ...]
    question: str
    answer: str = ""
    task: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    where: str = ""

    def prompt(self, processor: Any) -> Any:
        """Build the :class:`~mquant_jax.models.base.Prompt` with a processor.

        Raises:
            UserError: see the processor.
        """
        if self.messages:
            return processor.messages(self.messages, self.images)
        return processor.prompt(self.question, self.images)


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """Read a JSONL file of samples.

    Args:
        limit: number of samples to return; the rest of the file is still checked.

    Raises:
        UserError: no such file, not UTF-8, no samples; or invalid lines or missing pictures, of
            which the message lists the first ten.
    """
    path = checked_path(path, "samples")
    limit = None if limit is None else count(limit, "limit")
    reader = RowReader(path)
    samples: list[Any] = []
    bad: list[str] = []
    for number, line in json_lines(path):
        where = f"{path}:{number}"
        try:
            row = reader.row(line)
        except UserError as e:
            bad.append(f"{where}: {e}")
            continue
        if limit is None or len(samples) < limit:
            samples.append(_sample(row, where))
    _raise(bad, str(path))
    if reader.ignored:
        warn(
            f"{path}: unknown keys are ignored: {', '.join(reader.ignored)}",
            "calibration",
        )
    if not samples:
        raise UserError(f"{path}: no samples")
    return samples


def each(
    samples: Sequence[Sample], make: Callable[[Sample], T], progress: Callable = lambda x, _: x
) -> list[T]:
    """Apply ``make`` to all samples, for example to build prompts.

    Args:
        progress: ``(items, label) -> items``.

    Raises:
        UserError: some failed; the message lists file and line of the first ten.
    """
    made: list[Any] = []
    bad: list[str] = []
    kind = UserError
    for sample in progress(samples, "read pictures"):
        try:
            made.append(make(sample))
        except UserError as e:
            kind = type(e) if not bad else kind
            bad.append(f"{sample.where}: {e}" if sample.where else str(e))
    _raise(bad, "samples", kind)
    return made


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write samples with one picture array each to ``path`` and an ``.npz`` file."""
    np.savez_compressed(path.with_suffix(".npz"), images=np.stack([s.images[0] for s in samples]))
    lines = [
        json.dumps({"image": i, "question": s.question, "answer": s.answer, "task": s.task})
        for i, s in enumerate(samples)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _raise(bad: Sequence[str], where: str, kind: type[UserError] = UserError) -> None:
    """Raise one error that lists the first ten bad samples, with the full path only once."""
    if len(bad) == 1:
        raise kind(bad[0])
    if bad:
        more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        short = f"{Path(where).name}:"
        listed = "; ".join(_cut(text.replace(f"{where}:", short, 1)) for text in bad[:_LISTED])
        raise kind(f"{where}: {len(bad)} bad samples: {listed}{more}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def json_lines(path: Path) -> Iterable[tuple[int, str]]:
    """Line numbers and texts of the lines that are not blank.

    Only a line feed ends a line, because JSON strings may contain other separators at which
    ``str.splitlines`` would split.

    Raises:
        UserError: no such file, not a regular one, or not UTF-8.
    """
    try:
        path.stat()
    except FileNotFoundError as e:
        raise UserError(
            f"{path}: no such file; expected JSONL with image, question and answer"
        ) from e
    except (OSError, ValueError):
        pass  # reported when the file is read
    data = read_bytes(path, _MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {data[e.start]:#04x}); save the file in "
                        "UTF-8") from e  # fmt: skip
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _sample(row: Row, where: str) -> Sample:
    return Sample(row.images, row.question, row.answer, row.task, row.messages, where)
