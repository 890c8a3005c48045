"""Run every check that needs an NVIDIA GPU, most valuable first, in under 8 minutes.

    bash benchmarks/device_check.sh OUT [--from STEP] [--tiny]

The shell script stages the tree and the wheels, then runs this module. Steps:

``kernels``      the tests of the GPU kernels, compiled instead of interpreted
``product``      one W4A8 product against the int8 peak
``speed``        benchmarks.speed --suite gpu-7b: W4A8, W8A8 and bfloat16
``tune``         timings of kernel block sizes; a table for mquant_jax/assets/gpu_blocks.json
``conversion``   Qwen2-VL-2B's shapes with 4 + 4 layers to W4A8, stage by stage

Each step is a separate process with its own time limit. OUT gets ``report.json``, which is
rewritten after every step, ``log.txt`` with all output, and one result file per step: at most 8
files. A step that fails or times out does not stop the later ones. ``--from STEP`` starts at that
step and keeps the earlier steps' results in OUT. ``--tiny`` rehearses all steps with the smallest
sizes and also runs on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.output import save
from mquant_jax.cli_support import FAILED, OK, Parser, run_cli
from mquant_jax.errors import UserError

WHOLE = 470.0  # seconds for all steps, not counting the staging
REPORT, LOG = "report.json", "log.txt"
TAIL = 3  # lines of a step's output to keep in the report


@dataclasses.dataclass(frozen=True)
class Step:
    """One check.

    Attributes:
        limit: seconds after which it is killed.
        command: arguments for Python; ``{out}`` stands for the results folder.
        tiny: the same for the rehearsal.
        file: the name of its result file in that folder, if it writes one.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    file: str | None = None


def _pytest(*args: str) -> tuple[str, ...]:
    # Override the suite's options: worker processes would share one GPU, and whether a warning
    # is raised depends on the installed versions.
    options = (
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        "filterwarnings=default",
        "--tb=short",
        "--junitxml={out}/kernels.xml",
    )
    return "-m", "pytest", *options, *args


def _benchmark(name: str, file: str, *args: str) -> tuple[str, ...]:
    return "-m", f"benchmarks.{name}", *args, "--save", f"{{out}}/{file}"


_TESTS = "tests/mquant_jax/"
STEPS = (
    Step(
        "kernels", 100,
        _pytest(_TESTS + "test_ops_gpu.py", _TESTS + "test_ops_rotate.py", "-k", "not tpu"),
        _pytest(_TESTS + "test_ops_gpu.py", "-k", "test_partial_sums or test_the_table"),
        "kernels.xml",
    ),
    Step(
        "product", 40,
        _benchmark("product", "product.json"),
        _benchmark("product", "product.json", "--shape", "16,64,64"),
        "product.json",
    ),
    Step(
        "speed", 140,
        _benchmark("speed", "speed.json", "--suite", "gpu-7b", "--variant", "bfloat16",
                   "--variant", "w8a8-dynamic"),
        _benchmark("speed", "speed.json", "--layers", "1", "--variant", "w8a8-dynamic",
                   "--text-tokens", "8", "--image-side", "56", "--new-tokens", "2",
                   "--repeats", "1"),
        "speed.json",
    ),
    Step(
        "tune", 100,
        _benchmark("tune_gpu", "gpu_blocks.json", "--seconds", "80"),
        _benchmark("tune_gpu", "gpu_blocks.json", "--seconds", "10", "--rehearse"),
        "gpu_blocks.json",
    ),
    Step(
        "conversion", 90,
        _benchmark("conversion", "conversion.json", "--layers", "4"),
        _benchmark("conversion", "conversion.json", "--model", "demo", "--recipe", "w4a8-rtn"),
        "conversion.json",
    ),
)  # fmt: skip


def run_step(step: Step, command: Sequence[str], limit: float, out: Path) -> dict[str, Any]:
    """Run one step and append its output to the log.

    Returns:
        ``step``, ``outcome`` (``ok``, ``failed`` or ``out of time``), ``seconds``, ``exit_status``,
        ``result`` (the result file, if there is one), and ``tail``, the last lines of its output.
    """
    argv = [sys.executable, *(part.format(out=out) for part in command)]
    if step.file:
        (out / step.file).unlink(missing_ok=True)
    start = time.perf_counter()
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"--- {step.name}: {' '.join(argv[1:])}\n")
        log.flush()
        begin = log.tell()
        status = _wait(argv, limit, log)
    text = (out / LOG).read_bytes()[begin:].decode(errors="replace")
    outcome = "out of time" if status is None else "failed" if status else "ok"
    entry = {
        "step": step.name, "outcome": outcome, "seconds": round(time.perf_counter() - start, 1),
        "limit": round(limit, 1), "exit_status": status, "tail": text.splitlines()[-TAIL:],
    }  # fmt: skip
    if step.file and (out / step.file).exists():
        entry["result"] = step.file
    return entry


def _wait(argv: list[str], limit: float, log: TextIO) -> int | None:
    """Return the exit status, or ``None`` if the process group was killed at its limit."""
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the process and its children
        child.wait()


def check(
    out: Path, steps: Sequence[Step], first: str, tiny: bool = False, whole: float = WHOLE
) -> dict[str, Any]:
    """Run the steps from ``first`` on; rewrite ``report.json`` after each.

    Returns:
        The report: ``ok``, ``seconds`` and ``steps``, including those kept from earlier runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [step.name for step in steps]
    kept = _earlier(out / REPORT, names[: names.index(first)])
    start = time.perf_counter()
    report: dict[str, Any] = {"ok": False, "tiny": tiny, "seconds": 0.0, "steps": kept}
    for step in steps[names.index(first) :]:
        left = whole - (time.perf_counter() - start)
        if left < 1:
            entry = {"step": step.name, "outcome": "not begun: no time left"}
        else:
            command = step.tiny if tiny else step.command
            entry = run_step(step, command, min(step.limit, left), out)
        report["steps"].append(entry)
        report["seconds"] = round(time.perf_counter() - start, 1)
        save(report, out / REPORT)
        print(line(entry), flush=True)
    report["ok"] = all(entry["outcome"] == "ok" for entry in report["steps"])
    save(report, out / REPORT)
    return report


def _earlier(file: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of these steps from the report of an earlier run."""
    try:
        steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not a report of this command; choose another OUT") from e
    return [entry for entry in steps if entry["step"] in names]


def line(entry: dict[str, Any]) -> str:
    """Format one step for the terminal."""
    text = f"{entry['step']:<12}{entry['outcome']:<12}"
    if "seconds" in entry:
        text += f"{entry['seconds']:>7.1f} s of {entry['limit']:.0f}"
    return text if entry["outcome"] == "ok" else "\n    ".join([text, *entry.get("tail", ())])


def _run(argv: list[str]) -> int:
    parser = Parser("bash benchmarks/device_check.sh", __doc__ or "",
                    "exit status: 0 all steps ok, 1 some are not, 2 bad usage")  # fmt: skip
    names = [step.name for step in STEPS]
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the results")
    parser.add_argument("--from", dest="first", choices=names, default=names[0], metavar="STEP",
                        help=f"first step: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="rehearse with the smallest sizes")
    args = parser.parse_args(argv)
    report = check(args.out.resolve(), STEPS, args.first, args.tiny)
    return OK if report["ok"] else FAILED


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
