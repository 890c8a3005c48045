"""Read untrusted files safely: regular files of bounded size, UTF-8, JSON objects."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError

MOST_BYTES = 64 << 20  # limit for files read at once; the largest published index has 10 MB


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file or a link to one; false for impossible names."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder or a link to one; false for impossible names."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content.

    Raises:
        UserError: no such file, not a regular one, larger than ``most`` bytes, or unreadable.
    """
    try:
        check_regular(path, most)
        return path.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"{path}: cannot be read: no such file") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: see :func:`read_bytes`; not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not valid UTF-8: {e}") from e


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: see :func:`read_text`; not JSON, nested too deeply, or not an object.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    except RecursionError as e:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from e
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
        UserError: see :func:`read_json`.
    """
    return read_json(path) if os.path.lexists(path) else {}


def check_regular(path: Path, most: int | None = None) -> None:
    """Check that ``path`` is a regular file. Reading a device, pipe or socket might never end.

    Raises:
        UserError: another kind of file, or one larger than ``most`` bytes.
        OSError: no such file.
    """
    found = path.stat()
    mode = found.st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise UserError(f"{path}: is {kind}; expected a regular file")
    if most is not None and found.st_size > most:
        raise UserError(f"{path}: larger than {most >> 20} MiB; expected a smaller file")


def check_inside(path: Path) -> None:
    """Check that a file lies in its folder, or in the hub cache of the same model.

    The hub cache has links ``snapshots/<revision>/x -> ../../blobs/<hash>``.

    Raises:
        UserError: a link to another place, or another kind of file.
        OSError: no such file.
    """
    check_regular(path)
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    if target.is_relative_to(folder):
        return
    if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
        return
    raise UserError(f"{path}: is a link to {target}, outside its folder; copy the file here")
