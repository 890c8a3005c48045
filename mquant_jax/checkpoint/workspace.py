"""The work folder of a conversion, ``DST.work``, and how its result becomes DST.

    DST.work/lock            held by the conversion at work
    DST.work/journal.jsonl   what is finished
    DST.work/states/         hidden states that do not fit in memory
    DST.work/result/         becomes DST by one rename
    DST.work/publishing      which folder is becoming DST

DST appears complete or not at all, and what others put there meanwhile is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mquant_jax.checkpoint.rename import exchange, rename_new
from mquant_jax.checkpoint.tensor_file import PARTIAL, sync_folder
from mquant_jax.cli_support import signals_deferred
from mquant_jax.errors import UserError

SUFFIX = ".work"
_MAGIC = "mquant_jax conversion, process "
_DEEPEST = 160  # characters that the longest path inside the work folder may need
_FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than the file system or the process limit (ulimit -f) allows",
    errno.EIO: "the disk reports an input/output error; it may be failing",
    errno.EROFS: "the file system is read-only",
}
Identity = tuple[int, int, int, int]


class Workspace:
    """A locked work folder; see :func:`workspace`.

    Attributes:
        dst: what the result becomes, all links resolved.
        folder: the work folder.
        result, states: its folders to fill.
        journal: path of its journal.
        published: whether the result is DST, now or since an earlier run that was stopped while it
            cleaned up. Then nothing is left to do.
        resumed: whether the work folder is that of an earlier run.
    """

    def __init__(self, dst: Path, marker: str):
        self.dst, self.marker = dst, marker
        self.folder = work_folder(dst)
        self.result, self.states = self.folder / "result", self.folder / "states"
        self.journal = self.folder / "journal.jsonl"
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

    def publish(self) -> None:
        """Rename the result to DST.

        Raises:
            UserError: something appeared at DST that was not there at the start.
        """
        _sync(self.result)
        with signals_deferred(), _turn(self.dst.parent):
            self._note_publishing()
            if self.before is None:
                self._put_new()
            else:
                self._replace()
            self.published = True
            sync_folder(self.dst.parent)

    def _note_publishing(self) -> None:
        """Let a later run see whether DST is this result."""
        _write(self.folder / "publishing", _inode(self.result))
        sync_folder(self.folder)

    def _put_new(self) -> None:
        try:
            rename_new(self.result, self.dst)
        except FileExistsError as e:
            raise UserError(
                f"{self.dst}: appeared while this conversion was running and is left alone; "
                "choose another DST, or remove it"
            ) from e

    def _replace(self) -> None:
        if not os.path.lexists(self.dst):  # somebody removed it
            self._put_new()
            return
        old = self.folder / "old"
        if _identity(self.dst, self.marker) != self.before:
            self._changed()
        if exchange(self.result, self.dst):
            if _identity(self.result, self.marker) != self.before:
                exchange(self.result, self.dst)
                self._changed()
            return
        self.dst.rename(old)
        try:
            self._put_new()
        except BaseException:
            rename_new(old, self.dst)
            raise

    def _changed(self) -> None:
        raise UserError(
            f"{self.dst}: was changed or replaced while this conversion was running and is left "
            "alone; choose another DST, or convert again with --overwrite"
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
    """A locked work folder beside ``dst``, removed when the block has published its result.

    Args:
        marker: a file that checkpoints of ours hold; folders without it are never replaced.
        overwrite: replace the checkpoint that is at DST now. A DST that is a link stays one; what
            it points to is replaced.
        resume: go on with the work folder of a stopped conversion, if there is one.
        restart: remove that work folder and begin anew.
        keep: whether there is work worth resuming; asked when the block fails. If not, the work
            folder is removed.

    Raises:
        UserError: DST exists (without ``overwrite``), is no checkpoint, cannot be written or has
            too long a name; another conversion to it is running; a work folder is there and
            neither ``resume`` nor ``restart`` was asked for; the disk is full.
    """
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    given = Path(dst)
    work = Workspace(_real(given), marker)
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
    real = _real(Path(dst))
    _check_place(real)
    with _turn(real.parent):
        _check_running(real)
        if resume and _is_published(real):
            return
        _check_existing(Path(dst), real, marker, overwrite)
        _check_stale(real, resume, restart)


def work_folder(dst: Path) -> Path:
    """``DST.work``."""
    return dst.with_name(dst.name + SUFFIX)


# --- the start -----------------------------------------------------------------------------------


def _open(work: Workspace, given: Path, overwrite: bool, resume: bool, restart: bool) -> None:
    """Check everything, make the work folder and lock it."""
    _check_place(work.dst)
    with signals_deferred(), _turn(work.dst.parent):
        _check_running(work.dst)
        work.published = resume and _is_published(work.dst)
        _put_back(work.dst)
        if not work.published:
            _check_existing(given, work.dst, work.marker, overwrite)
            _check_stale(work.dst, resume, restart)
        work.before = _identity(work.dst, work.marker)
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
    """Lock the work folder and make what belongs in it."""
    work.lock = os.open(work.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(work.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    text = f"{_MAGIC}{os.getpid()}\n".encode()
    os.pwrite(work.lock, text, 0)
    os.ftruncate(work.lock, len(text))
    os.fsync(work.lock)
    for path in (work.result, work.states):
        path.mkdir(exist_ok=True)
    for path in work.result.rglob(f"*{PARTIAL}"):
        path.unlink()


def _real(dst: Path) -> Path:
    """The absolute path that ``dst`` means, links resolved."""
    text = os.fspath(dst)
    if "\0" in text:
        raise UserError(f"{text!r}: a path cannot hold a NUL character")
    try:
        os.fsencode(text)
        real = dst.resolve()
    except UnicodeEncodeError as e:
        raise UserError(f"{text!r}: this name cannot be written in the file system") from e
    except (OSError, RuntimeError) as e:  # RuntimeError: links that lead back to themselves
        raise UserError(f"{dst}: cannot be used: {getattr(e, 'strerror', None) or e}") from e
    if dst.is_symlink() and not real.exists():
        raise UserError(f"{dst}: is a link that leads nowhere; remove it or choose another DST")
    return real


def _check_place(dst: Path) -> None:
    """The parent can be written and the names fit."""
    parent = dst.parent
    if not dst.name:
        raise UserError(f"{dst}: is the root of the file system; choose another DST")
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


def _check_existing(given: Path, dst: Path, marker: str, overwrite: bool) -> None:
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise UserError(f"{given}: exists already; choose another DST or pass --overwrite")
    if not (dst / marker).is_file():
        raise UserError(
            f"{given}: is no checkpoint of ours, hence not overwritten; remove it first"
        )


def _check_running(dst: Path) -> None:
    """No other conversion is at work on ``dst``."""
    lock = work_folder(dst) / "lock"
    if not lock.is_file():
        return
    fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        holder = os.pread(fd, 200, 0).decode(errors="replace").removeprefix(_MAGIC).strip()
        raise UserError(
            f"{dst}: another conversion to it is running (process {holder}); wait for it or choose "
            "another DST"
        ) from e
    finally:
        os.close(fd)


def _check_stale(dst: Path, resume: bool, restart: bool) -> None:
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
    """Whether a folder was made by :func:`workspace`; one without content may have been."""
    try:
        return (folder / "lock").read_text(errors="replace").startswith(_MAGIC)
    except OSError:
        return not any(folder.iterdir())


def _is_published(dst: Path) -> bool:
    """Whether DST is the result of the work folder beside it, which was then not removed."""
    note = work_folder(dst) / "publishing"
    return note.is_file() and dst.is_dir() and note.read_text() == _inode(dst)


def _put_back(dst: Path) -> None:
    """Undo half an exchange: a kill came between two renames (:meth:`Workspace._replace`)."""
    old = work_folder(dst) / "old"
    if not os.path.lexists(dst) and old.is_dir():
        rename_new(old, dst)


# --- the end -------------------------------------------------------------------------------------


def _after_failure(work: Workspace, keep: Callable[[], bool], error: BaseException) -> None:
    """Remove the work folder, or say where it is. One of an earlier run is never removed: it may
    belong to other inputs."""
    if work.lock < 0:
        return
    kept = not work.published and (work.resumed or keep())
    _close(work, remove=not kept)
    if not kept:
        return
    note = f"what is finished stays in {work.folder}: --resume continues, --restart begins anew"
    if isinstance(error, UserError | KeyboardInterrupt):
        error.args = (f"{error or 'interrupted'}; {note}",)
    else:
        error.add_note(note)


def _close(work: Workspace, remove: bool) -> None:
    with _turn(work.dst.parent):
        _release(work, remove)


def _release(work: Workspace, remove: bool) -> None:
    """Let go of the lock."""
    lock, work.lock = work.lock, -1
    if remove:
        _remove(work.folder)
    if lock >= 0:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a work folder, its lock last: until then it is known to be ours."""
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _turn(parent: Path) -> Iterator[None]:
    """One process at a time looks at work folders in ``parent`` and makes or removes them."""
    fd = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot lock folders
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _clear_errors(dst: Path) -> Iterator[None]:
    """A disk that fails is one clear line."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(f"{dst}: cannot be written{where}: {_FULL[e.errno]}") from e


def _identity(dst: Path, marker: str) -> Identity | None:
    """What tells one checkpoint folder from another that has its name."""
    try:
        folder, file = os.stat(dst), os.stat(dst / marker)
    except OSError:
        return None
    return folder.st_dev, folder.st_ino, file.st_ino, file.st_mtime_ns


def _inode(folder: Path) -> str:
    info = os.stat(folder)
    return f"{info.st_dev} {info.st_ino}"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    """Flush files and folders to the disk, so that the rename is never ahead of its content."""
    for root, _, names in os.walk(folder):
        for path in (*(os.path.join(root, n) for n in names), root):
            sync_folder(Path(path))
