"""What every command line shares: one-line errors, exit statuses, progress bars."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

from mquant_jax.errors import UserError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
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


def run_cli(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and turn what a user can repair into one line on stderr.

    Returns:
        ``main``'s exit status; 2 after a :class:`UserError` or an ``OSError`` about a file; 130
        after an interrupt (Ctrl-C, SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may not fit the locale's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        with terminate_as_interrupt():
            return main(argv)
    except (UserError, OSError, KeyboardInterrupt) as e:
        if isinstance(e, OSError) and e.filename is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
        print("error: " + _one_line(e), file=sys.stderr)
        return INTERRUPTED if isinstance(e, KeyboardInterrupt) else USAGE


def utf8(argument: str) -> str:
    """A text from the command line, which is UTF-8 whatever the locale says.

    Raises:
        ValueError: it is not (argparse makes it a readable error).
    """
    return os.fsencode(argument).decode("utf-8")


def _one_line(e: BaseException) -> str:
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    text = f"{e.filename}: {e.strerror or e}" if isinstance(e, OSError) else str(e)
    return " ".join(text.split())


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt`` inside the block, so that clean-up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def warn(message: str) -> None:
    """One ``warning:`` line on stderr."""
    print("warning: " + " ".join(message.split()), file=sys.stderr)


def progress(items: Iterable[T], desc: str = "", total: int | None = None) -> Iterable[T]:
    """The same items, with a bar on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=desc, total=total, leave=False, file=sys.stderr)
