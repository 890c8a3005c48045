"""The conversion's command line, the same as ``python -m mquant_jax convert``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mquant_jax.cli_support import run_cli
from mquant_jax.commands import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 success, 2 bad usage or input."""
    return run_cli(convert.main, argv)


if __name__ == "__main__":
    sys.exit(main())
