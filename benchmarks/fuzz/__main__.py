"""Damage everything that is read from outside, and count the outcomes.

    python -m benchmarks.fuzz [--cases 10000] [--seed 0] [--kinds header,picture] [--json]
                              [--save FILE] [--seconds 60] [--megabytes 1024]
    python -m benchmarks.fuzz --case K [--seed 0]      run one case and show what it did

Outcomes: accepted; refused, by a UserError of one line; unclear, any other exception or a dead
process; hang and memory, beyond a case's limits. The exit status is 1 unless all cases are accepted
or refused. Needs a clone of the repository (goldens in tests/) and Linux.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.fuzz.bed import build
from benchmarks.fuzz.kinds import KINDS, kind_of, run_case
from benchmarks.fuzz.pool import DEFAULT, FAULTS, OUTCOMES, Limits, Pool
from benchmarks.output import add_output_options, deliver
from mquant_jax.cli_support import FAILED, OK, Parser, progress, run_cli
from mquant_jax.errors import UserError

_SHOWN = 20  # faults to list


def run(
    cases: Iterable[int],
    seed: int,
    limits: Limits = DEFAULT,
    say: Callable[[dict[str, Any]], None] = lambda fault: None,
) -> dict[str, Any]:
    """Run cases by number; a number and a seed always mean the same case.

    Args:
        say: called with each fault as it is found.

    Returns:
        ``{"seed", "cases", "seconds", "kinds": {kind: {outcome: count, "slowest": seconds}},
        "total": {outcome: count}, "faults": [...]}``; ``faults`` holds the first ones only.
    """
    began = time.monotonic()
    kinds = {kind: dict.fromkeys(OUTCOMES, 0) | {"slowest": 0.0} for kind in KINDS}
    faults, count = [], 0
    with tempfile.TemporaryDirectory(prefix="mquant-fuzz-") as folder:
        bed = Path(folder) / "bed"
        build(bed)
        with Pool(bed, seed, limits, run_case) as pool:
            for case in cases:
                found = {"case": case, "kind": kind_of(case)} | pool.run(case)
                counts = kinds[found["kind"]]
                counts[found["outcome"]] += 1
                counts["slowest"] = max(counts["slowest"], round(found["seconds"], 2))
                count += 1
                if found["outcome"] in FAULTS:
                    faults.append(found)
                    say(found)
    met = {kind: counts for kind, counts in kinds.items() if any(counts.values())}
    total = {o: int(sum(counts[o] for counts in met.values())) for o in OUTCOMES}
    return {
        "seed": seed,
        "cases": count,
        "limits": limits._asdict(),
        "seconds": round(time.monotonic() - began, 1),
        "kinds": met,
        "total": total,
        "faults": faults[:_SHOWN],
    }


def table(result: dict[str, Any]) -> str:
    """Format the counts by kind, and the faults."""
    lines = [f"{'kind':<13}" + "".join(f"{o:>10}" for o in OUTCOMES) + "   slowest"]
    for kind, counts in (result["kinds"] | {"all": result["total"]}).items():
        slowest = f"{counts['slowest']:8.1f} s" if "slowest" in counts else ""
        lines.append(f"{kind:<13}" + "".join(f"{counts[o]:>10}" for o in OUTCOMES) + slowest)
    return "\n".join([*lines, *map(described, result["faults"])])


def described(found: dict[str, Any]) -> str:
    """Return one line with what a case did and its outcome."""
    parts = [f"case {found['case']} ({found['kind']}): {found['outcome']}", found["error"],
             found["where"], *found["notes"]]  # fmt: skip
    return " | ".join(part for part in parts if part)


def _again(case: int, seed: int, limits: Limits) -> int:
    """Run one case alone; return its exit status."""
    with tempfile.TemporaryDirectory(prefix="mquant-fuzz-") as folder:
        build(Path(folder) / "bed")
        with Pool(Path(folder) / "bed", seed, limits, run_case) as pool:
            found = {"case": case, "kind": kind_of(case)} | pool.run(case)
    print(described(found))
    return FAILED if found["outcome"] in FAULTS else OK


def _kinds(text: str) -> set[str]:
    wanted = set(text.split(","))
    if unknown := wanted - set(KINDS):
        raise UserError(f"--kinds {', '.join(sorted(unknown))}: known are {', '.join(KINDS)}")
    return wanted


def _wanted(args: argparse.Namespace) -> list[int]:
    """Return the numbers of the first cases of the wanted kinds."""
    kinds = _kinds(args.kinds) if args.kinds else set(KINDS)
    rounds = range(-(-args.cases // len(kinds)) * len(KINDS))
    return [case for case in rounds if kind_of(case) in kinds][: args.cases]


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.fuzz", __doc__ or "")
    add = parser.add_argument
    add("--cases", type=int, default=10_000, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=0, help="default 0")
    add("--kinds", metavar="A,B", help=f"default all: {', '.join(KINDS)}")
    add("--case", type=int, metavar="K", help="run only this case and show what it did")
    add(
        "--seconds",
        type=float,
        default=60.0,
        help="processor time per case; default %(default)s",
    )
    add("--megabytes", type=int, default=1024, help="memory growth per case; default %(default)s")
    add_output_options(parser)
    args = parser.parse_args(argv)
    limits = Limits(args.seconds, args.megabytes << 20)
    if args.case is not None:
        return _again(args.case, args.seed, limits)
    say = (lambda fault: None) if args.json else (lambda fault: print(described(fault), flush=True))
    cases = progress(_wanted(args), "cases")
    result = run(cases, args.seed, limits, say)
    deliver(result, args, table)
    return FAILED if any(result["total"][o] for o in FAULTS) else OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
