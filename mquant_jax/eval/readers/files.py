"""Read benchmark files as published: VLMEvalKit's TSV, parquet, JSONL. Nothing is downloaded.

A reader yields rows ``(where, {column: value})``. Pictures are a list under ``images``, whatever
the file calls them.
"""

from __future__ import annotations

import ast
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.eval.readers.shards import KINDS
from mquant_jax.files import check_regular
from mquant_jax.sample_rows import RowReader, decoded, json_object
from mquant_jax.samples import json_lines
from mquant_jax.validate import shortened

IMAGES = "images"
_REFERENCE = 64  # characters; a longer cell is a picture, not a reference
_ROWS_AT_A_TIME = 64
Row = tuple[str, dict[str, Any]]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a ``.tsv``, ``.parquet`` or ``.jsonl`` file.

    Raises:
        UserError: the file is of another kind, missing or damaged, or a picture is missing; the
            message names file and line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a file named {', '.join(_READERS)}")
    try:
        check_regular(path)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; nothing is downloaded, fetch the data first") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    return reader(path)


def listed(value: Any) -> list[Any] | None:
    """The elements of a list, or of a list as JSON or Python text; ``None`` for other values."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else None
    return None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit on field length."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _tsv(path: Path) -> Iterator[Row]:
    rows = list(_table(path))
    cells = {row.get("index", ""): row.get("image", "") for _, row in rows}
    known: dict[str, list[Any]] = {}
    for where, row in rows:
        try:
            row[IMAGES] = _pictures(row, cells, known, path)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        row.pop("image", None)
        yield where, row


def _table(path: Path) -> Iterator[Row]:
    """Rows of text; missing cells at the end of a row are ""."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
            lines = csv.reader(file, delimiter="\t")
            names = next(lines, [])
            if "question" not in names:
                raise UserError(f"{path}: expected columns index, image, question, answer, ...; "
                                f"found {shortened(', '.join(names)) or 'none'}")  # fmt: skip
            for cells in lines:
                where = f"{path}:{lines.line_num}"
                if len(cells) > len(names):
                    raise UserError(f"{where}: {len(cells)} cells in {len(names)} columns; quote "
                                    "cells that contain tabs")  # fmt: skip
                if cells:
                    cells += [""] * (len(names) - len(cells))
                    yield where, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (byte {e.object[e.start]:#04x}); save it in "
                        "UTF-8") from e  # fmt: skip
    except csv.Error as e:
        raise UserError(f"{path}: damaged: {e}") from e


def _pictures(
    row: Mapping[str, str], cells: Mapping[str, str], known: dict[str, list[Any]], path: Path
) -> list[Any]:
    """The pictures of a row: base64, a list of base64, or the index of the row that has them.
    Without the column ``image``, the files that ``image_path`` names, relative to the TSV.

    Args:
        cells: index -> cell of the column ``image``.
        known: cell -> its pictures, shared by rows.
    """
    cell = row.get("image", "")
    if not cell:
        names = row.get("image_path", "") if "image" not in row else ""
        files = listed(names) or ([names] if names else [])
        return [RowReader(path).picture(name) for name in files]
    if len(cell) <= _REFERENCE and not cell.startswith("["):
        key, cell = cell, cells.get(cell, "")
        if len(cell) <= _REFERENCE:
            raise UserError(f"image {shortened(key, 40)!r}: expected base64, or the index of a row "
                            "with a picture")  # fmt: skip
    if cell not in known:
        refs = listed(cell) if cell.startswith("[") else [cell]
        if refs is None or not all(isinstance(ref, str) for ref in refs):
            raise UserError(f"image {shortened(cell, 40)!r}: expected base64, or a list of it")
        known[cell] = [decoded(ref.partition(",")[2] if ref.startswith("data:") else ref, ref)
                       for ref in refs]  # fmt: skip
    return known[cell]


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'mquant-jax[eval]'") from e
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    where = f"{path}: row {number}"
                    yield where, _with_images(row, path, where)
                    number += 1
    except (ValueError, OSError) as e:  # includes pyarrow's own errors
        raise UserError(f"{path}: cannot be read as parquet: {shortened(e)}") from e


def _with_images(row: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """The row with its pictures, from ``image``, ``images``, or ``image_1``, ``image_2``, ..."""
    columns = [c for c in ("image", IMAGES) if row.get(c) is not None][:1]
    columns = columns or [f"image_{i}" for i in range(1, 100) if row.get(f"image_{i}") is not None]
    found = [row.pop(c) for c in columns]
    found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    reader = RowReader(path)
    try:
        row[IMAGES] = [_struct(value, reader) for value in found]
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return row


def _struct(value: Any, reader: RowReader) -> Any:
    """A picture given as Hugging Face's ``{"bytes", "path"}``, as bytes, or as in JSONL."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray) and value:
        return bytes(value)
    return reader.picture(value)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in json_lines(path):
        where = f"{path}:{number}"
        try:
            row = json_object(line)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        yield where, _with_images(row, path, where)


_READERS = dict(zip(KINDS, (_tsv, _parquet, _jsonl), strict=True))
