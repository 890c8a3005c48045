"""Compare the speed of this checkout with another one's, in turns in one run.

    git worktree add /tmp/before COMMIT
    python -m venv /tmp/before/.venv && /tmp/before/.venv/bin/pip install -e /tmp/before
    python -m benchmarks.paired /tmp/before [--repeats 15] [--json] [--save FILE]

Each checkout runs in a process of its own, in the environment where it is installed (this one, and
``OTHER/.venv`` or ``--python``), with the models of ``benchmarks.speed`` (random weights,
a published model's shapes). Every round times all variants in one process and then in the other,
which begins in every second round. A ratio is the time of this checkout / the other's: below 1,
this one is faster. Its interval is the 95 % bootstrap interval of the median of the rounds' ratios.
A loss is reported where an interval does not exclude one of 5 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import add_output_options, deliver
from benchmarks.speed import AIFS, SUITES, recipes
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.validate import choice, count

HERE = Path(__file__).resolve().parents[1]
PARTS = ("vision", "prefill", "decode")
LOSS, DRAWS = 1.05, 2000


class Worker:
    """A process that times rounds of one checkout.

    Raises:
        UserError: the checkout has no benchmarks, there is no such interpreter, or the process
            ended.
    """

    def __init__(self, tree: Path, python: Path, arguments: Sequence[str]):
        if not (tree / "benchmarks" / "speed.py").is_file():
            raise UserError(f"{tree}: no checkout of this package (benchmarks/speed.py is missing)")
        if not python.is_file():
            raise UserError(
                f"{python}: no such interpreter; install {tree} into an environment of its own and "
                "name its interpreter with --python"
            )
        self.tree = tree
        script = HERE / "benchmarks" / "paired_worker.py"
        self.process = subprocess.Popen(
            [str(python), "-P", str(script), *arguments], cwd=tree, text=True,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def answer(self) -> dict[str, list[float]]:
        """Return the next line that the process writes; the first one is empty."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.tree}: its process ended, see the message above")
        return json.loads(line)

    def round(self) -> dict[str, list[float]]:
        """Time all variants once: seconds of each of ``PARTS`` by variant."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def compared(new: list[dict], old: list[dict]) -> list[dict[str, Any]]:
    """Return for each variant and part the median ratio of the rounds and its interval.

    Args:
        new, old: one result of :meth:`Worker.round` per round.
    """
    rng = np.random.default_rng(0)
    rows = []
    for name in new[0]:
        for i, part in enumerate(PARTS):
            own, other = (np.asarray([r[name][i] for r in rounds]) for rounds in (new, old))
            ratios = own / other
            drawn = np.median(rng.choice(ratios, (DRAWS, len(ratios))), axis=1)
            low, high = (float(x) for x in np.quantile(drawn, [0.025, 0.975]))
            rows.append({
                "variant": name, "part": part, "seconds": float(np.median(own)),
                "ratio": float(np.median(ratios)), "ratio_ci95": [low, high],
                "excludes_loss": high < LOSS,
            })  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """Format a result as text."""
    lines = [f"{'variant':14} {'part':8} {'ms':>8} {'ratio':>6}  95 % interval"]
    for r in result["rows"]:
        low, high = r["ratio_ci95"]
        mark = "" if r["excludes_loss"] else "  a loss of 5 % is not excluded"
        lines.append(
            f"{r['variant']:14} {r['part']:8} {1000 * r['seconds']:8.1f} {r['ratio']:6.3f}  "
            f"{low:.3f} to {high:.3f}{mark}"
        )
    return "\n".join(lines)


def measure(
    trees: Sequence[tuple[Path, Path]], arguments: Sequence[str], repeats: int
) -> list[list[dict]]:
    """Return the rounds of each checkout, given as folder and interpreter."""
    workers: list[Worker] = []
    try:
        for tree, python in trees:
            workers.append(Worker(tree, python, arguments))
            workers[-1].answer()  # compiled and warm
        rounds: list[list[dict]] = [[] for _ in workers]
        for i in progress(range(repeats), "measure"):
            for k in (0, 1) if i % 2 else (1, 0):
                rounds[k].append(workers[k].round())
        return rounds
    finally:
        for worker in workers:
            worker.close()


def commit(tree: Path) -> str:
    """Return the commit that a checkout is at, ``""`` if git cannot tell."""
    done = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip()


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.paired", __doc__ or "")
    add: Callable[..., Any] = parser.add_argument
    add("other", type=Path, metavar="OTHER", help="the other checkout")
    add("--python", type=Path, metavar="FILE", help="its interpreter (OTHER/.venv/bin/python)")
    add("--suite", choices=tuple(SUITES), default="cpu-2b", help="layer shapes (default cpu-2b)")
    add("--layers", type=int, metavar="N", help="layers of each tower (4; gpu-7b: 8)")
    add("--new-tokens", type=int, default=16, metavar="N", help="decode steps (default 16)")
    add("--repeats", type=int, default=15, metavar="N", help="measured rounds (default 15)")
    add("--variant", action="append", metavar="NAME", help="only this one; repeatable")
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in ("layers", "new_tokens", "repeats"):
        value = getattr(args, name)
        if value is not None:
            count(value, f"--{name.replace('_', '-')}")
    suite = SUITES[args.suite]
    known = [n for n in (*recipes(suite.float_type), AIFS) if n not in suite.leaves_out]
    for name in args.variant or ():
        choice(name, "--variant", known)
    layers = args.layers or suite.layers
    other = args.other.resolve()
    python = args.python or other / ".venv" / "bin" / "python"
    trees = (HERE, Path(sys.executable)), (other, python)
    names = ",".join(args.variant or known)
    rounds = measure(trees, [args.suite, str(layers), str(args.new_tokens), names], args.repeats)
    result = {
        "machine": machine(), "suite": args.suite, "layers": layers, "repeats": args.repeats,
        "commits": [commit(tree) for tree, _ in trees], "rows": compared(*rounds),
    }  # fmt: skip
    deliver(result, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
