"""Measure the time and memory of a conversion, stage by stage.

    python -m benchmarks.conversion [--model qwen2_vl-2b] [--layers N|full] [--recipe w4a8] [--json]
    python -m benchmarks.conversion --source DIR [--calibration FILE.jsonl] [...]

Without ``--source``, the source is a random sharded checkpoint with a published model's layer
shapes (see benchmarks/random_checkpoint.py). It is calibrated on 16 prompts, each with one picture
of 448 x 448 pixels and 256 text tokens. ``--model demo`` uses the demo model's shapes and the
bundled calibration set. Peak memory is that of this process; the source is streamed and never held
in memory as a whole. With ``--save``, FILE is rewritten after every stage, so an interrupted run
leaves the stages it finished.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.output import add_output_options, bytes_read, deliver, save
from benchmarks.random_checkpoint import DEMO, FULL, QWEN2_VL, layer_count, write
from mquant_jax.cli_support import OK, Parser, peak_bytes, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.presets import resolve_recipe
from mquant_jax.ptq.convert import convert
from mquant_jax.recipe import Recipe
from mquant_jax.stages import listening

PROMPTS, SIDE, WORDS = 16, 448, 240  # about 256 tokens including the chat template
SHARDS = 4


def source_for(
    model: str, layers: int | None, vocab: int, folder: Path
) -> tuple[Path, Path | None]:
    """Write a random model and its calibration file below ``folder``; ``None`` is the bundled
    set."""
    small = model == DEMO
    write(folder / "source", model, layers, vocab, shards=1 if small else SHARDS)
    return folder / "source", None if small else write_calibration(folder / "calibration")


def write_calibration(folder: Path, prompts: int = PROMPTS, side: int = SIDE) -> Path:
    """Write a JSONL file with ``prompts`` questions, each about a picture of ``side`` pixels."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(prompts):
        coarse = rng.integers(0, 256, (side // 28, side // 28, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / f"{i}.png")
        words = " ".join(rng.choice(["red", "a", "two", "left", "square"], WORDS))
        lines.append(json.dumps({"image": f"{i}.png", "question": words, "answer": "two"}))
    path = folder / "calibration.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def timed(
    source: Path, target: Path, recipe: Recipe, calibration: Path | None, file: Path | None
) -> dict[str, Any]:
    """Convert ``source`` to ``target``; write the result to ``file`` after every stage.

    Returns:
        ``seconds`` in total and per stage (``stages``), ``peak_rss_bytes`` of this process, the
        tensors' size before and after, and ``bytes_read`` from files for weights, hashes and
        spilled states.
    """
    stages: dict[str, float] = {}
    before = peak_bytes()
    result: dict[str, Any] = {
        "machine": machine(), "recipe": recipe.name, "source": source.name, "complete": False,
        "source_bytes": sum(f.stat().st_size for f in source.glob("*.safetensors")),
        "stages": stages, "rss_before_bytes": before,
    }  # fmt: skip
    start, read = time.perf_counter(), bytes_read()

    def note(name: str, seconds: float) -> None:
        stages[name] = stages.get(name, 0.0) + seconds
        save(result | {"peak_rss_bytes": peak_bytes()}, file)

    with listening(note):
        manifest = convert(source, target, recipe, calibration)
    return result | {
        "complete": True, "seconds": time.perf_counter() - start,
        "result_bytes": manifest["total_bytes"], "bytes_read": bytes_read() - read,
        "peak_rss_bytes": peak_bytes(),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
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
    add("--layers", default="4", metavar=f"N|{FULL}", help="layers of each tower (default 4)")
    add("--vocab", type=int, default=151936, metavar="N", help="default 151936")
    add(
        "--source",
        type=Path,
        metavar="DIR",
        help="a Hugging Face folder to convert instead of --model",
    )
    add("--calibration", type=Path, metavar="FILE.jsonl", help="calibration samples for --source")
    add("--recipe", default="w4a8", metavar="PRESET|FILE.json", help="default w4a8")
    add_output_options(parser)
    args = parser.parse_args(argv)
    layers = layer_count(args.layers)
    recipe = resolve_recipe(args.recipe)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.source:
            source, calibration = args.source, args.calibration
        else:
            source, calibration = source_for(args.model, layers, args.vocab, folder)
        deliver(timed(source, folder / "converted", recipe, calibration, args.save), args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
