"""Time and memory of a conversion, stage by stage.

    python -m benchmarks.conversion [--model qwen2_vl-2b] [--layers 4] [--recipe w4a8] [--json]
    python -m benchmarks.conversion --source DIR [...]

Without ``--source`` the source is a random checkpoint of a published model's layer shapes, or with
``--model demo`` of the demo model's (see benchmarks/random_checkpoint.py). Calibration data is the
bundled set. With ``--save`` the file is rewritten after every stage, so that a run that is
stopped leaves the stages it finished.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.output import add_output_options, deliver, peak_bytes, save
from benchmarks.random_checkpoint import DEMO, QWEN2_VL, write
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.presets import resolve_recipe
from mquant_jax.ptq.convert import convert
from mquant_jax.recipe import Recipe
from mquant_jax.stages import listening


def timed(source: Path, target: Path, recipe: Recipe, file: Path | None) -> dict[str, Any]:
    """Convert ``source`` to ``target``; ``file`` gets the result after every stage.

    Returns:
        ``seconds`` of the whole and of each of the ``stages``, ``peak_rss_bytes`` of this process,
        and the bytes of the tensors before and after.
    """
    stages: dict[str, float] = {}
    result: dict[str, Any] = {
        "machine": machine(), "recipe": recipe.name, "source": source.name, "complete": False,
        "source_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
        "stages": stages,
    }  # fmt: skip
    start = time.perf_counter()

    def note(name: str, seconds: float) -> None:
        stages[name] = stages.get(name, 0.0) + seconds
        save(result | {"peak_rss_bytes": peak_bytes()}, file)

    with listening(note):
        manifest = convert(source, target, recipe)
    return result | {
        "complete": True, "seconds": time.perf_counter() - start,
        "result_bytes": manifest["total_bytes"], "peak_rss_bytes": peak_bytes(),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{name:<22}{seconds:>8.1f} s" for name, seconds in result["stages"].items()]
    lines.append(f"{'all':<22}{result['seconds']:>8.1f} s")
    before, after, peak = (
        result[key] / 1e6 for key in ("source_bytes", "result_bytes", "peak_rss_bytes")
    )
    return "\n".join([*lines, f"{before:.0f} MB -> {after:.0f} MB, peak memory {peak:.0f} MB"])


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.conversion", __doc__ or "")
    add = parser.add_argument
    add("--model", choices=(*QWEN2_VL, DEMO), default=QWEN2_VL[0], help="default %(default)s")
    add("--layers", type=int, default=4, metavar="N", help="layers of each tower (default 4)")
    add("--vocab", type=int, default=151936, metavar="N", help="default 151936")
    add("--source", type=Path, metavar="DIR", help="a Hugging Face folder, in place of --model")
    add("--recipe", default="w4a8", metavar="PRESET|FILE.json", help="default w4a8")
    add_output_options(parser)
    args = parser.parse_args(argv)
    if args.layers < 1:
        raise UserError("--layers must be 1 or more")
    recipe = resolve_recipe(args.recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = args.source or folder / "source"
        if args.source is None:
            write(source, args.model, args.layers, args.vocab)
        deliver(timed(source, folder / "converted", recipe, args.save), args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
