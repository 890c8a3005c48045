"""What every command line shares: one-line errors, exit statuses, progress bars."""

from __future__ import annotations

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
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with ``--debug`` known to every command."""

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
    """``--no-verify``, for commands that load a checkpoint; ``args.verify`` is the opposite."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="load files that were edited, or too large to compare with their hashes",
    )


def run_cli(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and turn what a user can repair into one line on stderr.

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
    """What C++ libraries print goes to stderr from now on; Python's output stays on stdout.

    Gloo, which connects processes on CPUs, says hello on stdout, where JSON is to come.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def utf8(argument: str) -> str:
    """A text from the command line, which is UTF-8 whatever the locale says.

    Raises:
        ValueError: it is not (argparse makes it a readable error).
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
    """SIGTERM and SIGHUP raise ``KeyboardInterrupt`` inside the block, so that clean-up runs; where
    they are ignored (``nohup``) they stay so."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    with _handled(_ENDING, interrupt):
        yield


@contextlib.contextmanager
def signals_deferred(forget: bool = False) -> Iterator[None]:
    """Signals that would end the program wait until the block is done.

    Args:
        forget: do not deliver them then: the program is ending already.
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
    """Another handler for those signals that are neither ignored nor handled outside Python; only
    the main thread may set handlers."""
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
    """Warnings of these kinds are errors inside the block."""
    token = _STRICT.set(tuple(kinds))
    try:
        yield
    finally:
        _STRICT.reset(token)


def warn(message: str, kind: str = "") -> None:
    """One ``warning:`` line on stderr.

    Args:
        kind: one of :data:`WARNINGS`, or none of them.

    Raises:
        UserError: :func:`strict` makes this kind an error.
    """
    if kind in _STRICT.get():
        raise UserError(f"{message} (an error by --strict {kind})")
    print("warning: " + " ".join(message.split()), file=sys.stderr)


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterable[T]:
    """The same items, with a bar on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=desc, total=total, leave=False, file=sys.stderr)


def peak_bytes() -> int:
    """The peak resident memory of this process; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
