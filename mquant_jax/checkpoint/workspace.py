"""The work folder of a conversion, ``DST.work``, and how its result becomes DST.

    DST.work/lock            held by the running conversion
    DST.work/journal.jsonl   finished steps
    DST.work/recipe.json     bits chosen within a budget, if one was given
    DST.work/states/         hidden states that do not fit in memory
    DST.work/result/         becomes DST by one rename

DST appears complete or not at all, and anything that others put there in the meantime is left
alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mquant_jax.checkpoint.destination import (
    MAGIC,
    Identity,
    check_existing,
    check_place,
    check_running,
    check_stale,
    identity,
    put_back,
    real_path,
    turn,
    work_folder,
)
from mquant_jax.checkpoint.rename import exchange, rename_new
from mquant_jax.checkpoint.tensor_file import PARTIAL, sync_folder
from mquant_jax.cli_support import signals_deferred
from mquant_jax.errors import UserError

_FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than the file system or the process limit (ulimit -f) allows",
    errno.EIO: "the disk reports an input/output error; it may be failing",
    errno.EROFS: "the file system is read-only",
}


class Workspace:
    """A locked work folder; see :func:`workspace`.

    Attributes:
        dst: path of the result, all links resolved.
        folder: the work folder.
        result, states: its folders to fill.
        journal: path of its journal.
        choice: path of a recipe that was chosen within a budget.
        published: whether DST is the result.
        resumed: whether the work folder is that of an earlier run.
    """

    def __init__(self, dst: Path, marker: str, overwrite: bool):
        self.dst, self.marker, self.overwrite = dst, marker, overwrite
        self.folder = work_folder(dst)
        self.result, self.states = self.folder / "result", self.folder / "states"
        self.journal = self.folder / "journal.jsonl"
        self.choice = self.folder / "recipe.json"
        self.published = self.resumed = False
        self.before: Identity | None = None  # what was at DST at the start
        self.lock = -1  # a descriptor, while the lock is held

    def require(self, needed: int) -> None:
        """
        Raises:
            UserError: the disk has fewer than ``needed`` bytes free.
        """
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.dst}: needs {needed} bytes, the disk has {free} free; free some space"
            )

    def has_result(self, of_same_inputs: Callable[[], bool]) -> bool:
        """Return whether DST, found at the start of a run with ``resume``, already is the result.

        Args:
            of_same_inputs: whether the checkpoint at DST was made from this run's inputs.

        Raises:
            UserError: it is another checkpoint, and there was no ``overwrite``.
        """
        self.published = self.before is not None and of_same_inputs()
        if not self.published:
            self._check_replaceable()
        return self.published

    def publish(self) -> None:
        """Rename the result to DST.

        Raises:
            UserError: DST exists without ``overwrite``, or appeared since the start.
        """
        self._check_replaceable()
        _sync(self.result)
        with signals_deferred(), turn(self.dst.parent):
            if self.before is None:
                self._put_new()
            else:
                self._replace()
            self.published = True
            sync_folder(self.dst.parent)

    def _check_replaceable(self) -> None:
        if self.before is not None and not self.overwrite:
            raise UserError(
                f"{self.dst}: exists already and was made from other inputs; choose another DST "
                "or pass --overwrite"
            )

    def _put_new(self) -> None:
        try:
            rename_new(self.result, self.dst)
        except FileExistsError as e:
            raise UserError(
                f"{self.dst}: appeared while this conversion was running and is left alone; "
                "choose another DST, or remove it"
            ) from e

    def _replace(self) -> None:
        if not os.path.lexists(self.dst):  # another process removed it
            self._put_new()
            return
        self._check_unchanged(self.dst)
        if exchange(self.result, self.dst):
            try:
                self._check_unchanged(self.result)
            except UserError:
                exchange(self.result, self.dst)
                raise
            return
        old = self.folder / "old"
        self.dst.rename(old)
        try:
            self._check_unchanged(old)
            self._put_new()
        except BaseException:
            if not os.path.lexists(self.dst):
                rename_new(old, self.dst)
            raise

    def _check_unchanged(self, folder: Path) -> None:
        """Check that ``folder`` is what was at DST at the start."""
        if identity(folder, self.marker) != self.before:
            raise UserError(
                f"{self.dst}: was changed or replaced while this conversion was running and is "
                "left alone; choose another DST, or convert again with --overwrite"
            )


@contextlib.contextmanager
def workspace(
    dst: str | Path,
    marker: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    keep: Callable[[], bool] = lambda: False,
) -> Iterator[Workspace]:
    """Yield a locked work folder beside ``dst``, removed when the block has published its result.

    Args:
        marker: a file that all our checkpoints hold; folders without it are never replaced.
        overwrite: replace the checkpoint that is at DST now. If DST is a link, its target is
            replaced and the link is kept.
        resume: continue with the work folder of a stopped conversion, if there is one. DST may
            then be a checkpoint: perhaps the result of that conversion, which was killed while
            removing its work folder (:meth:`Workspace.has_result`).
        restart: remove that work folder and start again.
        keep: whether there is work worth resuming; called when the block fails. If not, the work
            folder is removed.

    Raises:
        UserError: DST exists (without ``overwrite``), is no checkpoint, cannot be written or has
            too long a name; another conversion to it is running; there is a work folder, but
            neither ``resume`` nor ``restart``; the disk is full.
    """
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    given = Path(dst)
    work = Workspace(real_path(given), marker, overwrite)
    try:
        with _clear_errors(given):
            _open(work, given, overwrite, resume, restart)
            yield work
            with signals_deferred():
                _close(work, remove=True)
    except BaseException as error:
        with signals_deferred(forget=isinstance(error, KeyboardInterrupt)):
            _after_failure(work, keep, error)
        raise


# --- the start -----------------------------------------------------------------------------------


def _open(work: Workspace, given: Path, overwrite: bool, resume: bool, restart: bool) -> None:
    """Check everything, create the work folder and lock it."""
    check_place(work.dst)
    with signals_deferred(), turn(work.dst.parent):
        check_running(work.dst)
        put_back(work.dst)
        check_existing(given, work.dst, work.marker, overwrite, resume)
        check_stale(work.dst, resume, restart)
        work.before = identity(work.dst, work.marker)
        if restart and work.folder.is_dir():
            _remove(work.folder)
        work.resumed = work.folder.is_dir()
        work.folder.mkdir(exist_ok=True)
        try:
            _fill(work)
        except BaseException:
            _release(work, remove=not work.resumed)
            raise


def _fill(work: Workspace) -> None:
    """Lock the work folder and create its content."""
    work.lock = os.open(work.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(work.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    text = f"{MAGIC}{os.getpid()}\n".encode()
    os.pwrite(work.lock, text, 0)
    os.ftruncate(work.lock, len(text))
    os.fsync(work.lock)
    for path in (work.result, work.states):
        path.mkdir(exist_ok=True)
    for path in work.result.rglob(f"*{PARTIAL}"):
        path.unlink()


# --- the end -------------------------------------------------------------------------------------


def _after_failure(work: Workspace, keep: Callable[[], bool], error: BaseException) -> None:
    """Remove the work folder, or say where it is. An earlier run's is never removed: it may belong
    to other inputs."""
    if work.lock < 0:
        return
    kept = not work.published and (work.resumed or keep())
    _close(work, remove=not kept)
    if not kept:
        return
    note = f"what is finished stays in {work.folder}: --resume continues, --restart begins anew"
    if isinstance(error, UserError | KeyboardInterrupt):
        error.args = (f"{str(error) or 'interrupted'}; {note}",)
    else:
        error.add_note(note)


def _close(work: Workspace, remove: bool) -> None:
    with turn(work.dst.parent):
        _release(work, remove)


def _release(work: Workspace, remove: bool) -> None:
    """Release the lock."""
    lock, work.lock = work.lock, -1
    try:
        if remove:
            _remove(work.folder)
    finally:
        if lock >= 0:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a work folder, its lock file last: it marks the folder as ours."""
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _clear_errors(dst: Path) -> Iterator[None]:
    """Turn disk errors into one clear line."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        where = f"{e.filename}: " if e.filename else ""
        raise UserError(f"{dst}: not written: {where}{_FULL[e.errno]}") from e


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    """Flush files and folders to the disk, so that the rename never precedes its content."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, n) for n in names), root):
            sync_folder(Path(path))
