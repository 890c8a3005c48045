"""Kill conversions with SIGKILL, resume them, and compare the result with an undisturbed one.

    python -m benchmarks.kills [--kills 200] [--model demo] [--layers 4] [--seed 0] [--json]

A conversion runs in a process of its own and is killed after a random time; the next one resumes it
and is killed in turn, until one comes to its end. Then all begins anew, until there were as many
kills as asked for. Reported: tensors that differ from those of the undisturbed conversion, and
what was left beside DST other than DST.work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conversion import DEMO, source_for
from benchmarks.output import add_output_options, deliver
from benchmarks.random_checkpoint import QWEN2_VL, layer_count
from mquant_jax.cli_support import FAILED, OK, Parser, progress, run_cli
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.recipe import Recipe

_PAUSE = 0.01  # seconds between looks at a process


def short(recipe: Recipe, samples: int) -> Recipe:
    """The recipe with so few calibration samples that a run takes seconds."""
    calibration = dataclasses.replace(recipe.calibration, max_samples=samples)
    return dataclasses.replace(recipe, calibration=calibration)


def started(arguments: tuple, resume: bool) -> int:
    """A conversion in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        source, target, recipe, calibration = arguments
        convert(source, target, recipe, calibration, resume=resume)
        status = 0
    finally:
        os._exit(status)


def ended(process: int, limit: float) -> int | None:
    """The exit status of a process; ``None``: it was killed after ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_PAUSE)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def tensors(folder: Path) -> dict[str, str]:
    """Name -> sha256, as the manifest records them."""
    manifest = json.loads((folder / "mquant.json").read_text(encoding="utf-8"))
    return {name: entry["sha256"] for name, entry in manifest["tensors"].items()}


def measured(arguments: tuple, kills: int, seed: int) -> dict[str, Any]:
    """Kill until there were ``kills``."""
    source, target, recipe, calibration = arguments
    rng, start = np.random.default_rng(seed), time.perf_counter()
    if ended(started(arguments, False), np.inf) != 0:
        raise RuntimeError("the undisturbed conversion failed")
    whole, expected = time.perf_counter() - start, tensors(target)
    shutil.rmtree(target)
    result = {"kills": 0, "conversions": 0, "failures": 0, "differences": 0, "leftovers": 0}
    bar = iter(progress(range(kills), "kills"))
    while result["kills"] < kills:
        code = ended(started(arguments, True), rng.uniform(0, 0.5 * whole))
        beside = {p.name for p in target.parent.iterdir()}
        result["leftovers"] += len(beside - {target.name, f"{target.name}.work"})
        if code is None:
            result["kills"] += 1
            next(bar, None)
        elif code != 0:
            result["failures"] += 1
            shutil.rmtree(target.with_name(f"{target.name}.work"), ignore_errors=True)
        if target.exists():
            if code == 0:
                result["leftovers"] += f"{target.name}.work" in beside
            result["conversions"] += 1
            found = tensors(target)
            names = expected.keys() | found.keys()
            result["differences"] += sum(expected.get(n) != found.get(n) for n in names)
            shutil.rmtree(target)
            shutil.rmtree(target.with_name(f"{target.name}.work"), ignore_errors=True)
    return result | {"undisturbed_seconds": whole, "seconds": time.perf_counter() - start}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    return "\n".join(f"{name:<22}{value:>10.5g}" for name, value in result.items())


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.kills", __doc__ or "")
    add = parser.add_argument
    add("--kills", type=int, default=200, metavar="N", help="default 200")
    add("--model", choices=(DEMO, *QWEN2_VL), default=DEMO, help="default %(default)s")
    add("--layers", default="4", help="layers of each tower (default 4), but for the demo")
    add("--vocab", type=int, default=151936, help="default 151936")
    add("--samples", type=int, default=4, metavar="N", help="calibration samples (default 4)")
    add("--seed", type=int, default=0, help="default 0")
    add_output_options(parser)
    args = parser.parse_args(argv)
    recipe = short(PRESETS["w4a8"], args.samples)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, calibration = source_for(args.model, layer_count(args.layers), args.vocab, folder)
        (folder / "out").mkdir()
        arguments = (source, folder / "out" / "dst", recipe, calibration)
        result = measured(arguments, args.kills, args.seed)
    deliver(result, args, table)
    bad = result["differences"] + result["leftovers"] + result["failures"]
    return FAILED if bad else OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
