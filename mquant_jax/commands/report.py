"""Write a report with plots on the quantisation of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from mquant_jax.cli_support import OK, Parser, add_no_verify
from mquant_jax.report.findings import collect
from mquant_jax.report.page import write_report
from mquant_jax.report.summary import summary

EPILOG = """\
DIR/report.html is self-contained and works offline; its plots are also PNG files in DIR. Needs
matplotlib: pip install 'mquant-jax[report]'. python -m mquant_jax inspect prints a summary.
"""


def main(argv: list[str]) -> int:
    """Write the report."""
    parser = Parser("python -m mquant_jax report", __doc__ or "", EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert")
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    findings = collect(args.checkpoint, args.verify)
    page, *drawn = write_report(findings, args.out)
    if args.json:
        print(
            json.dumps(summary(findings) | {"html": str(page), "pictures": list(map(str, drawn))})
        )
    else:
        print(f"{page}: {len(drawn)} pictures, {page.stat().st_size / 1e3:.0f} kB")
    return OK
