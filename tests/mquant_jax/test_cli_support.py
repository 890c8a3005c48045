"""Behaviour shared by all command lines, seen from a shell."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from mquant_jax.cli_support import UNREAD, terminate_as_interrupt

PROGRAM = """
import sys
from mquant_jax.cli_support import run_cli
def main(argv):
    sys.stdin.readline()  # the reader of stdout has gone by now
    print("x" * int(argv[0]))
    return 0
sys.exit(run_cli(main))
"""


@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_reader_that_leaves_ends_the_command_quietly(size) -> None:
    """A closed pipe, as with ``| head -1``, gives no traceback, with or without buffering."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout and child.stderr
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.stderr.read() == b"" and child.wait() == UNREAD


class Collected:
    """Raises the signal in ``__del__``, where Python ignores exceptions, like JAX's garbage
    collector callback."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_lost_comes_again() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        Collected()
        while time.monotonic() < began + 20:
            time.sleep(0.01)
    assert time.monotonic() < began + 10
