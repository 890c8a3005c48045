"""Output shared by all benchmarks: a table or JSON on stdout, JSON in a file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--save``."""
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--save", type=Path, metavar="FILE", help="write the JSON object to FILE as well")


def bytes_read() -> int:
    """Return how many bytes this process has read from files; 0 where the system does not report
    it."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def save(result: dict[str, Any], file: Path | None) -> None:
    """Write a result to ``file``, if one is given."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def deliver(
    result: dict[str, Any], args: argparse.Namespace, table: Callable[[dict[str, Any]], str]
) -> None:
    """Save and print a result as the options of :func:`add_output_options` ask."""
    save(result, args.save)
    print(json.dumps(result) if args.json else table(result))
