"""Folders that appear whole or not at all.

A new folder is filled as ``.DST.partial-<pid>`` beside DST and renamed at the end. What a killed
process left is removed by the next write to the same DST.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from mquant_jax.errors import UserError

PATIENCE = 10.0  # seconds that threads get to finish writing what will be removed


def check_destination(dst: Path, marker: str, overwrite: bool = False) -> None:
    """Fail early where a write to ``dst`` would fail; nothing is written.

    Args:
        marker: a file that folders of ours hold; others are never overwritten.

    Raises:
        UserError: DST exists (without ``overwrite``), is not a checkpoint, or has no parent folder
            that can be written.
    """
    parent = dst.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent}: no such folder; create it before converting into it")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent}: cannot be written; choose another DST")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise UserError(f"{dst}: exists already; choose another DST or pass --overwrite")
    if not (dst / marker).is_file():
        raise UserError(f"{dst}: is no checkpoint of ours and is not overwritten; remove it first")


@contextlib.contextmanager
def new_folder(dst: Path, marker: str, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``dst`` when the block ends well; else ``dst`` is as before.

    Args:
        dst: absolute path.
        needed: bytes that will be written, roughly.

    Raises:
        UserError: see :func:`check_destination`; not enough space.
    """
    _remove_stale(dst)
    check_destination(dst, marker, overwrite)
    partial = _sibling(dst, "partial", os.getpid())
    with _cleaned_up(partial, dst, needed):
        partial.mkdir()
        yield partial
        _sync(partial)
        _swap_in(partial, dst)


def _sibling(dst: Path, kind: str, pid: int) -> Path:
    return dst.parent / f".{dst.name}.{kind}-{pid}"


def _remove_stale(dst: Path) -> None:
    """Remove what dead processes left of saves to ``dst``; put back a DST they had moved away."""
    for kind in ("old", "partial"):
        for path in dst.parent.glob(f".{_glob_escape(dst.name)}.{kind}-*"):
            pid = path.name.rpartition("-")[2]
            if not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
                continue
            if kind == "old" and not dst.exists():
                path.rename(dst)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _glob_escape(name: str) -> str:
    """``name`` with the glob characters taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, of another user
        return True
    return True


@contextlib.contextmanager
def _cleaned_up(partial: Path, dst: Path, needed: int) -> Iterator[None]:
    """Check the space, and remove ``partial`` whatever stops the block."""
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise UserError(f"{dst}: needs {needed} bytes, the disk has {free} free; free some space")
    before = set(threading.enumerate())
    try:
        yield
    except BaseException as e:
        started = set(threading.enumerate()) - before
        _remove(partial, [t for t in started if not t.daemon])  # daemons may never end
        if isinstance(e, Exception) and _disk_full(e):
            raise UserError(f"{dst}: the disk is full; the checkpoint needs {needed} bytes") from e
        raise


def _remove(folder: Path, writers: Iterable[threading.Thread]) -> None:
    """Remove a folder that ``writers`` may still fill: an interrupt does not stop Orbax's threads,
    and what they write makes the folder anew.

    They may finish first; those that take longer than ``PATIENCE`` fail once the folder is gone.
    """
    for _ in range(2):
        end = time.monotonic() + PATIENCE
        for thread in writers:
            # Not its own join, which in Orbax raises what went wrong in the thread.
            threading.Thread.join(thread, max(0.0, end - time.monotonic()))
        shutil.rmtree(folder, ignore_errors=True)


def _disk_full(e: BaseException | None) -> bool:
    while e is not None:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False


def _sync(folder: Path) -> None:
    """Flush files and folders to the disk, so that the rename is never ahead of its content."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, n) for n in names), root):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _swap_in(partial: Path, dst: Path) -> None:
    """Rename ``partial`` to ``dst``; an older DST is removed only after that."""
    old = _sibling(dst, "old", os.getpid())
    try:
        if dst.exists():
            dst.rename(old)
        partial.rename(dst)
    finally:  # also after an interrupt between two of these lines
        if not dst.exists() and old.exists():
            old.rename(dst)
        shutil.rmtree(old, ignore_errors=True)
    fd = os.open(dst.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
