"""Measure a start: load a checkpoint of 2B parameters and compile it.

    python -m benchmarks.startup [--layers 28] [--json] [--save FILE]

Writes a random ``w4a8`` checkpoint with Qwen2-VL-2B's published shapes (1.7 GB, in a temporary
folder). The vision tower gets as many layers as the language model: 28, where the published one has
32. Then three processes run one after the other. Each imports the package, loads the checkpoint,
and compiles the decode loop and a prefill of 512 tokens with a picture:

``no cache``      compile everything, keep nothing
``first start``   compile everything and keep it (mquant_jax/compile_cache.py)
``next start``    find the compiled programs in the cache

The checkpoint has just been written, so it is probably in the page cache: disk speed is not
measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.output import add_output_options, deliver
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.compile_cache import WORTH_SECONDS
from mquant_jax.errors import UserError

TEXT_TOKENS, IMAGE_SIDE, NEW_TOKENS = 256, 448, 16
PARTS = ("import", "load", "compile_prefill", "compile_decode", "first_token")


def write(folder: Path, layers: int) -> int:
    """Write the checkpoint; return its size in bytes."""
    from benchmarks.aot.sizes import MODELS
    from benchmarks.random_checkpoint import cut_config
    from benchmarks.speed import random_model
    from mquant_jax.checkpoint.writer import save
    from mquant_jax.models.qwen2_vl import FAMILY
    from mquant_jax.nn.params import get_params
    from mquant_jax.presets import PRESETS

    hf = cut_config("qwen2_vl-2b", layers, MODELS["qwen2_vl-2b"]["vocab_size"])
    config = FAMILY.config_from_hf(hf)
    language = dataclasses.replace(config.language, tied_head=False)
    recipe = PRESETS["w4a8"]
    config = dataclasses.replace(config, language=language)
    params = get_params(random_model(FAMILY, config, recipe, jnp.bfloat16))
    manifest = save(
        folder, params, family=FAMILY.name, hf_config=hf, recipe=recipe, tied_head=False
    )
    return manifest["total_bytes"]


def start(folder: Path, began: float) -> dict[str, float]:
    """Start once, in this process; return the seconds of each of the :data:`PARTS`."""
    from mquant_jax.compile_cache import keep_compiled_programs
    from mquant_jax.eval.speed import Greedy
    from mquant_jax.loading import load_model

    times = [began, time.time()]
    keep_compiled_programs()
    loaded = load_model(folder)
    jax.block_until_ready(jax.tree.leaves(loaded.model))
    times.append(time.time())
    greedy = Greedy(loaded.model, NEW_TOKENS - 1)
    prompt = loaded.family.example_prompt(loaded.config, TEXT_TOKENS, IMAGE_SIDE)
    batch = jax.tree.map(jnp.asarray, loaded.family.collate(loaded.config, [prompt]))
    slots = greedy.slots(batch)
    first = greedy.start.lower(greedy.params, batch, slots=slots).compile()
    times.append(time.time())
    answers = jax.eval_shape(partial(greedy.start, slots=slots), greedy.params, batch)
    greedy.go_on.lower(greedy.params, answers, jnp.int32(NEW_TOKENS)).compile()
    times.append(time.time())
    jax.block_until_ready(first(greedy.params, batch))
    times.append(time.time())
    return {name: b - a for name, a, b in zip(PARTS, times[:-1], times[1:], strict=True)}


def fresh(folder: Path, settings: dict[str, str]) -> dict[str, float]:
    """Run :func:`start` in a new process with these environment variables."""
    command = [sys.executable, "-m", "benchmarks.startup", "--start", str(folder)]
    command += ["--began", str(time.time())]
    child = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        raise UserError(f"a start failed with exit status {child.returncode}; see its output above")
    return json.loads(child.stdout.splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """Format the rows as text."""
    titles = "".join(f"{name.replace('_', ' '):>17}" for name in PARTS)
    lines = [
        f"{result['layers']} layers, {result['checkpoint_bytes'] / 1e9:.2f} GB; seconds",
        f"{'':<12}{titles}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['start']:<12}" + "".join(f"{row[name]:>17.1f}" for name in PARTS))
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.startup", __doc__ or "")
    add = parser.add_argument
    add("--layers", type=int, default=28, metavar="N", help="layers of each tower (default 28)")
    add_output_options(parser)
    add(
        "--start",
        type=Path,
        metavar="DIR",
        help="start once from this checkpoint, in this process; print JSON",
    )
    add("--began", type=float, metavar="S", help="with --start: the process's start time")
    args = parser.parse_args(argv)
    if args.layers < 1:
        raise UserError("--layers must be 1 or more")
    if args.start:
        print(json.dumps(start(args.start, args.began or time.time())))
        return OK
    from mquant_jax.commands.bench import machine

    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary, "checkpoint"), str(Path(temporary, "cache"))
        size = write(folder, args.layers)
        off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        kept = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(WORTH_SECONDS),
        }
        starts = {"no cache": off, "first start": kept, "next start": kept}
        rows = [{"start": n} | fresh(folder, s) for n, s in progress(list(starts.items()), "start")]
    out = {"machine": machine(), "model": "Qwen2-VL-2B", "layers": args.layers,
           "checkpoint_bytes": size, "rows": rows}  # fmt: skip
    deliver(out, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
