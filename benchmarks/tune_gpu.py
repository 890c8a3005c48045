"""How the GPU kernels cut a product: write the table that they read.

    python -m benchmarks.tune_gpu [--model qwen2_vl-7b] [--rows N]... [--save FILE] [--json]
    python -m benchmarks.tune_gpu --ahead-of-time [...]

On an NVIDIA GPU every candidate is timed beside XLA's own product of the same operands, and the
fastest is written, XLA's included. With `--ahead-of-time` no GPU is needed, but the extra aot-gpu:
candidates are compiled for an H100 and ranked by what the compiler says of registers, spills and
shared memory and by arithmetic on published rates. That is how the table in the package
was made, which no device has seen; timing replaces it:

    python -m benchmarks.tune_gpu --save mquant_jax/assets/gpu_blocks.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.backend import prepare, sharding
from benchmarks.aot.devices import DEVICES
from benchmarks.aot.occupancy import analyse, candidates
from benchmarks.aot.sizes import MODELS
from benchmarks.output import add_output_options, deliver
from models.base import abstract_model
from models.registry import family_for
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.errors import UserError
from mquant_jax.nn.params import abstract_params
from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import gpu, xla
from mquant_jax.ops.pallas_gpu import Blocks, matmul, partial_sums
from mquant_jax.presets import PRESETS

ROWS = (1, 1024)
_REPEATS, _RUNS = 20, 5
# What shapes fall into that no entry names: small enough for any chip, and without a spill.
CLASSES = [
    {"rows": gpu.FEW_ROWS, "out": None, "path": gpu.FEW, "blocks": [64, 16, 64, 4, 4, 4]},
    {"rows": 64, "out": None, "path": gpu.MANY, "blocks": [64, 64, 64, 4, 3, 1]},
    {"rows": None, "out": 2048, "path": gpu.MANY, "blocks": [128, 128, 64, 8, 3, 1]},
    {"rows": None, "out": None, "path": gpu.MANY, "blocks": [256, 128, 64, 8, 3, 1]},
]


def shapes_of(model: str) -> list[tuple[int, int]]:
    """``(out, in)`` of every kind of 4-bit product with one scale per channel in a model."""
    family = family_for(MODELS[model], model)
    config = family.config_from_hf(MODELS[model])
    params = abstract_params(abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16))
    return sorted(
        {
            (value.out_features, value.in_features)
            for value in params.values()
            if isinstance(value, QWeight) and gpu.suits(value) and value.out_features > 1
        }
    )


def seconds(call: Callable[..., jax.Array], *args: Any) -> float:
    """Median time of one call, of :data:`_RUNS` times :data:`_REPEATS` in a row."""
    jax.block_until_ready(call(*args))
    taken = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(_REPEATS):
            out = call(*args)
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - start) / _REPEATS)
    return statistics.median(taken)


def timed(rows: int, out: int, k: int) -> list[dict[str, Any]]:
    """Candidates and XLA's product for one shape, fastest first; a kernel that differs from XLA's
    product is an error, one that the compiler refuses is left out."""
    rng = np.random.default_rng(0)
    x = QTensor(jnp.asarray(rng.integers(-128, 128, (rows, k)), jnp.int8), jnp.float32(0.01))
    packed = jnp.asarray(rng.integers(0, 256, (out, k // 2)), jnp.uint8)
    w = QWeight(packed, jnp.full((out, 1), 0.01, jnp.float32), k, 4, "packed")
    reference = jax.jit(lambda x, w: xla.packed_int_dot(x, w).astype(jnp.bfloat16))
    found = [{"path": gpu.XLA, "us": seconds(reference, x, w) * 1e6}]
    expected = np.asarray(reference(x, w), np.float32)
    many = rows > gpu.FEW_ROWS
    for blocks in candidates(many, rows):
        call = jax.jit(_form(many, blocks))
        try:
            got = np.asarray(call(x, w), np.float32)
        except jax.errors.JaxRuntimeError as e:
            print(f"  {blocks}: {str(e).splitlines()[0][:80]}", file=sys.stderr)
            continue
        if not np.allclose(got, expected, rtol=0.01, atol=1e-3 * np.abs(expected).max()):
            raise UserError(f"{blocks} computes something else than XLA at {rows} x {out} x {k}")
        cut = [getattr(blocks, name) for name in Blocks.__dataclass_fields__]
        path = gpu.MANY if many else gpu.FEW
        found.append({"path": path, "blocks": cut, "us": seconds(call, x, w) * 1e6})
    return sorted(found, key=lambda entry: entry["us"])


def _form(many: bool, blocks: Blocks) -> Callable[[QTensor, QWeight], jax.Array]:
    if many:
        return lambda x, w: matmul(x.values, w.values, x.scale, w.scale, blocks)

    def few(x: QTensor, w: QWeight) -> jax.Array:
        sums = partial_sums(x.values, w.values, blocks).sum(0)
        return (sums.astype(jnp.float32) * (x.scale * w.scale[:, 0])).astype(jnp.bfloat16)

    return few


def analysed(rows: int, out: int, k: int, where: Any) -> list[dict[str, Any]]:
    """Candidates for one shape by analysis, best first."""
    path = gpu.MANY if rows > gpu.FEW_ROWS else gpu.FEW
    return [{"path": path, **entry} for entry in analyse(rows, out, k, where)]


def tune(models: list[str], rows: list[int], ahead_of_time: bool) -> dict[str, Any]:
    """The table.

    Raises:
        UserError: no NVIDIA GPU to time on, or no compiler to analyse with.
    """
    if ahead_of_time:
        prepare(DEVICES["h100"])
        where = sharding(DEVICES["h100"])
        origin = (
            "Ahead-of-time analysis for an H100: registers, spills and shared memory as the "
            "compiler reports them, the rest arithmetic (benchmarks/aot/occupancy.py). No device "
            "has run any of it."
        )
    else:
        if jax.default_backend() != "gpu" or not gpu.suits_device():
            raise UserError(
                "timing needs an NVIDIA GPU (Ampere or later) and jax[cuda13]; "
                "--ahead-of-time does without"
            )
        origin = f"Timed on {jax.devices()[0].device_kind}, jax {jax.__version__}."
    entries = []
    for out, k in sorted({shape for model in models for shape in shapes_of(model)}):
        for n in sorted({gpu.bucket(n) for n in rows}):
            print(f"{n} x {out} x {k}", file=sys.stderr)
            found = analysed(n, out, k, where) if ahead_of_time else timed(n, out, k)
            if found:
                entries.append({"rows": n, "out": out, "in": k, **found[0]})
    return {"origin": origin, "shapes": entries, "classes": CLASSES}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [result["origin"], "", f"{'rows':>6} {'out':>7} {'in':>7} {'us':>8}  path, blocks"]
    for entry in result["shapes"]:
        us = entry.get("us", entry.get("score_us"))
        lines.append(f"{entry['rows']:>6} {entry['out']:>7} {entry['in']:>7} {us:>8.1f}  "
                     f"{entry['path']} {entry.get('blocks', '')}")  # fmt: skip
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.tune_gpu", __doc__ or "")
    add = parser.add_argument
    add("--model", action="append", choices=tuple(MODELS), help="whose shapes; repeatable "
        "(default qwen2_vl-7b)")  # fmt: skip
    add("--rows", action="append", type=int, metavar="N", help="activation rows, to the next power "
        f"of two; repeatable (default {' and '.join(map(str, ROWS))})")  # fmt: skip
    add("--ahead-of-time", action="store_true", help="rank by analysis, without a GPU")
    add_output_options(parser)
    args = parser.parse_args(argv)
    if any(n < 1 for n in args.rows or ()):
        raise UserError("--rows must be 1 or more")
    result = tune(args.model or ["qwen2_vl-7b"], args.rows or list(ROWS), args.ahead_of_time)
    deliver(result, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
