"""The files and splits of a data set: one file, a folder of shards, or a pattern."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, is_folder
from mquant_jax.validate import shortened

KINDS = (".tsv", ".parquet", ".jsonl")
SPLIT = "split"  # column with a row's split, in files with several splits
# validation-00000-of-00003.parquet, followed by a hash in older data sets.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")


def files_of(path: Path, split: str | None = None) -> list[Path]:
    """The files that ``--data`` names, in order.

    Args:
        path: a file; a folder, searched recursively for files of one kind; or a pattern with ``*``.
        split: keep files whose name gives this split. Files without a split in their name are all
            kept, because their rows may give it.

    Raises:
        UserError: no files; files of several kinds; several splits and none chosen, or an unknown
            one; a missing shard.
    """
    found = _candidates(path)
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(kinds)}); choose one "
                        "kind, for example with a pattern")  # fmt: skip
    if len(found) == 1 and split is None:
        return found
    names = sorted({name for file in found if (name := split_of(file))})
    if split is None and len(names) > 1:
        raise UserError(f"{path}: has the splits {', '.join(names)}; choose one with --split")
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
            raise UserError(f"{path}: the folder has no file named {', '.join(KINDS)}")
    elif "*" in str(path) and not is_file(path):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not found:
            raise UserError(f"{path}: no file matches the pattern")
    else:
        found = [path]
    return sorted(file for file in found if not is_folder(file))


def split_of(file: Path) -> str:
    """The split in a shard's name; "" if there is none."""
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
