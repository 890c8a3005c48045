"""The command line of the checks, the same as ``python -m mquant_jax verify``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mquant_jax.cli_support import run_cli
from mquant_jax.commands import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 ok, 1 a check failed, 2 bad usage or input."""
    return run_cli(verify.main, argv)


if __name__ == "__main__":
    sys.exit(main())
