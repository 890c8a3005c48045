"""Shared by all command lines: one-line errors, exit statuses, progress bars."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import contextvars
import io
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from mquant_jax.errors import UserError

OK, FAILED, USAGE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_AGAIN = 2.0  # seconds
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and ``--debug``."""

    def __init__(self, prog: str, description: str, epilog: str = ""):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_no_verify(parser: Parser) -> None:
    """Add ``--no-verify``, which sets ``args.verify`` to false."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare files with their hashes, for edited or very large checkpoints",
    )


def run_cli(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and report errors that a user can fix as one line on stderr.

    Returns:
        ``main``'s exit status; 2 after a :class:`UserError` or an ``OSError`` about a file; 130
        after an interrupt (Ctrl-C, SIGTERM, SIGHUP); 141, without a word, if the reader of stdout
        has gone (``| head``).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may not fit the locale's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminate_as_interrupt():
            status = main(argv)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered is flushed at exit
        return UNREAD
    except (UserError, OSError, KeyboardInterrupt) as e:
        if isinstance(e, OSError) and e.filename is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print("error: " + _one_line(e), file=sys.stderr)
        return INTERRUPTED if isinstance(e, KeyboardInterrupt) else USAGE


def keep_stdout_clean() -> None:
    """Redirect the output of C++ libraries to stderr; Python's output stays on stdout.

    Gloo, which connects processes on CPUs, prints to stdout, where a caller expects JSON.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def utf8(argument: str) -> str:
    """Decode a command-line argument as UTF-8, whatever the locale.

    Raises:
        ValueError: it is not UTF-8 (argparse reports it).
    """
    return os.fsencode(argument).decode("utf-8")


def _one_line(e: BaseException) -> str:
    if isinstance(e, KeyboardInterrupt):
        return str(e) or "interrupted"
    text = f"{e.filename}: {e.strerror or e}" if isinstance(e, OSError) else str(e)
    return " ".join(text.split())


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``KeyboardInterrupt`` inside the block, so that clean-up code runs.
    Ignored signals (``nohup``) stay ignored.

    It is raised again every few seconds until the block ends: Python ignores what is raised in a
    callback of the garbage collector, and JAX has one that often runs after a long computation.
    """
    ended = threading.Event()

    def repeat(signum: int) -> None:
        if not ended.wait(_AGAIN):
            _thread.interrupt_main(signal.Signals(signum))

    def interrupt(signum, frame):
        threading.Thread(target=repeat, args=(signum,), daemon=True).start()
        raise KeyboardInterrupt

    try:
        with _handled(_ENDING, interrupt):
            yield
    finally:
        ended.set()


@contextlib.contextmanager
def signals_deferred(forget: bool = False) -> Iterator[None]:
    """Defer signals that would end the program until the end of the block.

    Args:
        forget: drop them instead, because the program is already ending.
    """
    waiting: list[int] = []
    try:
        with _handled((signal.SIGINT, *_ENDING), lambda signum, frame: waiting.append(signum)):
            yield
    finally:
        if waiting and not forget:
            signal.raise_signal(waiting[0])


@contextlib.contextmanager
def _handled(signals: Iterable[int], handler: Callable[..., Any]) -> Iterator[None]:
    """Set a handler for those signals that are neither ignored nor handled outside Python. Does
    nothing off the main thread, which alone may set handlers."""
    known = signals if _on_main_thread() else ()
    before = {s: signal.getsignal(s) for s in known}
    before = {s: old for s, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


WARNINGS = ("calibration", "config", "memory", "tokenizer")
_STRICT: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("strict", default=())


@contextlib.contextmanager
def strict(kinds: Sequence[str]) -> Iterator[None]:
    """Turn warnings of these kinds into errors inside the block."""
    token = _STRICT.set(tuple(kinds))
    try:
        yield
    finally:
        _STRICT.reset(token)


def warn(message: str, kind: str = "") -> None:
    """Print a ``warning:`` line to stderr.

    Args:
        kind: one of :data:`WARNINGS`, or "".

    Raises:
        UserError: :func:`strict` makes this kind an error.
    """
    if kind in _STRICT.get():
        raise UserError(f"{message} (an error because of --strict {kind})")
    print("warning: " + " ".join(message.split()), file=sys.stderr)


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterable[T]:
    """Iterate over items with a progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=desc, total=total, leave=False, file=sys.stderr)


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux reports KiB, macOS bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
