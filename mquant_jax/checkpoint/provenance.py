"""Record which files a checkpoint was made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.hub import model_folder
from mquant_jax.checkpoint.source import INDEX, Reader
from mquant_jax.checkpoint.tensor_file import file_hash
from mquant_jax.errors import UserError
from mquant_jax.files import is_file, is_folder


def hash_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return file name -> ``{"bytes", "sha256"}``; hashes several files at a time.

    Raises:
        UserError: a file cannot be read.
    """

    def one(path: Path) -> dict[str, Any]:
        try:
            return file_hash(path)
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}") from e

    paths = list(paths)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return {p.name: h for p, h in zip(paths, pool.map(one, paths), strict=True)}


def source_files(reader: Reader) -> list[Path]:
    """Return all files of a model folder that its conversion depends on."""
    weights = sorted({info.file for info in reader.tensors.values()})
    index = reader.folder / INDEX
    names = [reader.folder / "config.json", *([index] if index.is_file() else []), *weights]
    return [*names, *reader.side_files()]


def source_misfits(source: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """Return how a model folder differs from what a checkpoint was made from.

    Args:
        source: the table of a manifest.
        folder: the model's folder, or its Hub name.

    Raises:
        UserError: no such folder, or a file that cannot be read.
    """
    folder = model_folder(folder)
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder; --source takes the folder that was converted")
    if not source:
        yield "the checkpoint does not say which files it was made from"
        return
    there = [folder / name for name in source if is_file(folder / name)]
    found = hash_files(there)
    for name, entry in source.items():
        if name not in found:
            yield f"{folder / name}: no such file; the checkpoint was made from one"
        elif found[name] != entry:
            yield f"{folder / name}: is not the file that the checkpoint was made from"
