"""What all command lines share, seen from a shell."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mquant_jax.cli_support import UNREAD

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
    """As in ``| head -1``: no traceback, whether output is written at once or at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout and child.stderr
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.stderr.read() == b"" and child.wait() == UNREAD
