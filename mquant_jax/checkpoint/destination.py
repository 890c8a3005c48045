"""The destination of a conversion: what exists at DST, what stopped conversions have left.

Nothing here writes, except for :func:`put_back`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mquant_jax.checkpoint.rename import rename_new
from mquant_jax.errors import UserError

SUFFIX = ".work"
MAGIC = "mquant_jax conversion, process "
_DEEPEST = 160  # characters reserved for the longest path inside the work folder
Identity = tuple[int, int, int, int]


def check_destination(
    dst: str | Path,
    marker: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
) -> None:
    """Fail early where :func:`workspace` would fail; nothing is written.

    Raises:
        UserError: as there.
    """
    real = real_path(Path(dst))
    check_place(real)
    with turn(real.parent):
        check_running(real)
        check_existing(Path(dst), real, marker, overwrite, resume)
        check_stale(real, resume, restart)


def work_folder(dst: Path) -> Path:
    """``DST.work``."""
    return dst.with_name(dst.name + SUFFIX)


def real_path(dst: Path) -> Path:
    """Return the absolute path of ``dst``, with links resolved."""
    text = os.fspath(dst)
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot hold a NUL character")
    try:
        os.fsencode(text)
        real = dst.resolve()
    except UnicodeEncodeError as e:
        raise UserError(f"{text!r}: this name cannot be written in the file system") from e
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links
        raise UserError(f"{dst}: cannot be used: {getattr(e, 'strerror', None) or e}") from e
    if not real.name:
        raise UserError(f"{dst}: is the root of the file system; choose another DST")
    if os.path.islink(dst) and not os.path.exists(real):
        raise UserError(f"{dst}: is a link that leads nowhere; remove it or choose another DST")
    return real


def check_place(dst: Path) -> None:
    """Check that the parent is writable and that the names are not too long."""
    parent = dst.parent
    try:
        if not parent.is_dir():
            raise UserError(f"{parent}: no such folder; create it before converting into it")
        limits = os.pathconf(parent, "PC_NAME_MAX"), os.pathconf(parent, "PC_PATH_MAX")
    except OSError as e:
        raise UserError(f"{parent}: cannot be used: {e.strerror}") from e
    name, path = (len(os.fsencode(p)) for p in (work_folder(dst).name, work_folder(dst)))
    if name > limits[0]:
        raise UserError(
            f"{dst}: the name of its work folder, {SUFFIX} added, would take {name} bytes; "
            f"{limits[0]} are allowed: choose a shorter name"
        )
    if path + _DEEPEST >= limits[1]:
        raise UserError(f"{dst}: the path is too long ({path} bytes); choose a shorter one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent}: cannot be written; choose another DST")


def check_existing(
    given: Path, dst: Path, marker: str, overwrite: bool, resume: bool = False
) -> None:
    """
    Args:
        resume: a checkpoint at ``dst`` may be the result itself.

    Raises:
        UserError: what is at ``dst`` cannot become, or be, the result.
    """
    if not os.path.lexists(dst) or (resume and (dst / marker).is_file()):
        return
    if not overwrite:
        raise UserError(f"{given}: exists already; choose another DST or pass --overwrite")
    if not (dst / marker).is_file():
        raise UserError(
            f"{given}: is no checkpoint of ours, hence not overwritten; remove it first"
        )


def check_running(dst: Path) -> None:
    """Check that no other conversion to ``dst`` is running."""
    lock = work_folder(dst) / "lock"
    if not lock.is_file():
        return
    fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        holder = os.pread(fd, 200, 0).decode(errors="replace").removeprefix(MAGIC).strip()
        raise UserError(
            f"{dst}: another conversion to it is running (process {holder}); wait for it or choose "
            "another DST"
        ) from e
    finally:
        os.close(fd)


def check_stale(dst: Path, resume: bool, restart: bool) -> None:
    folder = work_folder(dst)
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not _is_ours(folder):
        raise UserError(f"{folder}: is in the way and is no work folder of ours; move it away")
    if not (resume or restart):
        raise UserError(
            f"{folder}: is left of a conversion that was stopped; --resume continues it, "
            "--restart begins anew"
        )


def _is_ours(folder: Path) -> bool:
    """Return whether :func:`workspace` made a folder.

    A folder with only a partial lock file may be one, whose process was killed at that point.
    """
    try:
        text = (folder / "lock").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    others = any(path.name != "lock" for path in folder.iterdir())
    return text.startswith(MAGIC) or (MAGIC.startswith(text) and not others)


def put_back(dst: Path) -> None:
    """Undo half an exchange, after a kill between two renames (:meth:`Workspace._replace`)."""
    old = work_folder(dst) / "old"
    if not os.path.lexists(dst) and old.is_dir():
        rename_new(old, dst)


def identity(dst: Path, marker: str) -> Identity | None:
    """Return what distinguishes a checkpoint folder from another one of the same name."""
    try:
        folder, file = os.stat(dst), os.stat(dst / marker)
    except OSError:
        return None
    return folder.st_dev, folder.st_ino, file.st_ino, file.st_mtime_ns


@contextlib.contextmanager
def turn(parent: Path) -> Iterator[None]:
    """Let one process at a time inspect, create or remove work folders in ``parent``."""
    fd = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # the file system cannot lock folders
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
