"""Write a report with plots on the quantisation of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from mquant_jax.cli_support import OK, Parser, add_no_verify
from mquant_jax.loading import outline
from mquant_jax.report.findings import collect
from mquant_jax.report.page import Ran, write_report
from mquant_jax.report.summary import summary
from mquant_jax.runtime.choices import example_rows
from mquant_jax.target import target

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
    tokens, ran = example_rows(outline(args.checkpoint, args.verify))
    findings = collect(args.checkpoint, verify=False)  # already verified
    page, *drawn = write_report(findings, args.out, Ran(target().platform, tokens, ran))
    if args.json:
        files = {"html": str(page), "pictures": list(map(str, drawn))}
        print(json.dumps(summary(findings) | {"forms": ran} | files))
    else:
        print(f"{page}: {len(drawn)} pictures, {page.stat().st_size / 1e3:.0f} kB")
    return OK
