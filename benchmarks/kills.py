"""Kill a conversion at random moments, resume it, and compare it with an uninterrupted one.

    python -m benchmarks.kills OUT [--model demo] [--kills 200] [--recipe w4a8] [--seed 0] [--json]
    python -m benchmarks.kills OUT --model qwen2_vl-2b --layers 4 --kills 20 [...]

The source and its calibration prompts are those of benchmarks/conversion.py; ``--model demo`` is
the bundled model itself.
Kills are chained: a resumed conversion is killed again until one finishes, then a new chain begins.
A difference is a checkpoint whose tensors or report differ from the uninterrupted conversion's. A
leftover is anything beside DST and DST.work after a kill, or beside DST after a success.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.conversion import source_for
from benchmarks.random_checkpoint import DEMO, FULL, QWEN2_VL, layer_count
from mquant_jax.cli_support import FAILED, OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.samples import DEMO_ASSETS

Source = tuple[Path, Path | None]  # a model, and its calibration samples


def convert(source: Source, dst: Path, recipe: str, limit: float | None = None) -> bool:
    """Convert or resume; kill the conversion after ``limit`` seconds.

    Returns:
        Whether it finished before the limit.

    Raises:
        UserError: it ended with an error.
    """
    model, calibration = source
    command = [sys.executable, "-m", "mquant_jax", "convert", str(model), str(dst)]
    command += ["--recipe", recipe, "--resume"]
    if calibration:
        command += ["--calibration", str(calibration)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, err = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return False
    if child.returncode:
        raise UserError(f"{dst}: the conversion ended with {child.returncode}: {err.decode()}")
    return True


def content(folder: Path) -> dict[str, Any]:
    """Return the manifest entries that two conversions must agree on."""
    manifest = json.loads((folder / "mquant.json").read_text(encoding="utf-8"))
    return {key: manifest[key] for key in ("tensors", "parts", "files", "recipe", "source")}


def run(out: Path, source: Source, recipe: str, kills: int, seed: int) -> dict[str, Any]:
    """Run the whole experiment.

    Returns:
        ``{"kills", "chains", "differences", "leftovers", "seconds_uninterrupted"}``.

    Raises:
        UserError: a conversion ended with an error.
    """
    reference, dst, rng = out / "reference", out / "dst", random.Random(seed)
    convert(source, reference, recipe)
    shutil.rmtree(reference)
    began = time.perf_counter()
    convert(source, reference, recipe)  # timed with a warm compilation cache
    whole = time.perf_counter() - began
    expected = content(reference)
    result = {"kills": 0, "chains": 0, "differences": 0, "leftovers": 0}
    bar = iter(progress(range(kills), "kill"))
    while result["kills"] < kills:
        ended = convert(source, dst, recipe, whole * rng.random() ** 2)  # most are killed
        allowed = {"reference", "dst"} if ended else {"reference", "dst", "dst.work"}
        result["leftovers"] += len({p.name for p in out.iterdir()} - allowed)
        result["kills" if not ended else "chains"] += 1
        if not ended:
            next(bar)
        else:
            result["differences"] += content(dst) != expected
            shutil.rmtree(dst)
    if (out / "dst.work").exists() or dst.exists():  # the last killed run is still to be resumed
        convert(source, dst, recipe)
        result["chains"] += 1
        result["differences"] += content(dst) != expected
    return {**result, "seconds_uninterrupted": whole}


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.kills", __doc__ or "")
    add = parser.add_argument
    add("out", type=Path, help="new folder for the conversions")
    add("--model", choices=(*QWEN2_VL, DEMO), default=DEMO, help="default %(default)s")
    add("--layers", default="4", metavar=f"N|{FULL}", help="layers of each tower (default 4)")
    add("--vocab", type=int, default=151936, metavar="N", help="default 151936")
    add("--recipe", default="w4a8", help="default w4a8")
    add("--kills", type=int, default=200, metavar="N", help="default 200")
    add("--seed", type=int, default=0, help="of the moments (default 0)")
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} exists; choose another folder")
    layers = layer_count(args.layers)
    args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = DEMO_ASSETS / "model", None
        if args.model != DEMO:
            source = source_for(args.model, layers, args.vocab, Path(temporary))
        result = run(args.out, source, args.recipe, args.kills, args.seed)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return FAILED if result["differences"] or result["leftovers"] else OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
