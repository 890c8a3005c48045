"""The files of a data set: one, a folder of shards, or those that a pattern names; their splits."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, is_folder
from mquant_jax.validate import shortened

KINDS = (".tsv", ".parquet", ".jsonl")
SPLIT = "split"  # the column that names a row's split, in files that hold several
# validation-00000-of-00003.parquet, with a hash behind it in older data sets.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")


def files_of(path: Path, split: str | None = None) -> list[Path]:
    """The files that ``--data`` names, in order.

    Args:
        path: a file; a folder, with the files of one kind in it and below; or a pattern with ``*``.
        split: only files of this split, as their names say; files that name none are all taken,
            since their rows may.

    Raises:
        UserError: no files; files of several kinds; several splits and none chosen, or none of
            that name; a shard that a folder lacks.
    """
    found = _candidates(path)
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) > 1:
        raise UserError(f"{path}: holds files of several kinds ({', '.join(kinds)}); name those of "
                        "one, for example with a pattern")  # fmt: skip
    if len(found) == 1 and split is None:
        return found
    names = sorted({name for file in found if (name := split_of(file))})
    if split is None and len(names) > 1:
        raise UserError(f"{path}: holds the splits {', '.join(names)}; choose one with --split")
    if split is not None and names:
        found = [file for file in found if split_of(file) == split]
        if not found:
            raise UserError(f"{path}: has no split {split!r}; found {', '.join(names)}")
    if is_folder(path):
        _complete(found)
    return found


def _candidates(path: Path) -> list[Path]:
    if is_folder(path):
        found = [file for file in path.rglob("*") if file.suffix.lower() in KINDS]
        if not found:
            raise UserError(f"{path}: the folder holds no file named {', '.join(KINDS)}")
    elif "*" in str(path) and not is_file(path):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not found:
            raise UserError(f"{path}: no file has such a name")
    else:
        found = [path]
    return sorted(file for file in found if not is_folder(file))


def split_of(file: Path) -> str:
    """The split that a shard's name says; "" where it says none."""
    found = _SHARD.fullmatch(file.stem)
    return found.group(1) if found else ""


def _complete(files: Sequence[Path]) -> None:
    """
    Raises:
        UserError: a shard is missing.
    """
    there: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if found := _SHARD.fullmatch(file.stem):
            key = file.parent, found.group(1), int(found.group(3))
            there.setdefault(key, set()).add(int(found.group(2)))
    for (folder, name, count), numbers in there.items():
        if missing := sorted(set(range(count)) - numbers):
            raise UserError(f"{folder}: of the {count} shards of {name}, these are missing: "
                            f"{shortened(', '.join(map(str, missing)))}")  # fmt: skip
