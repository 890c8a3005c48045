"""Choose the block sizes of the GPU kernels and write the table that the kernels read.

    python -m benchmarks.tune_gpu [--model qwen2_vl-7b] [--rows N]... [--save FILE] [--json]
    python -m benchmarks.tune_gpu --ahead-of-time [...]

On an NVIDIA GPU, every candidate is timed against XLA's own product of the same operands, and the
fastest of all is written. With ``--save``, FILE is rewritten after every candidate. ``--seconds``
ends the search early. ``--ahead-of-time`` needs no GPU, but the extra aot-gpu: it compiles the
candidates for an H100 and ranks them by the compiler's counts of registers, spills and shared
memory, and by published rates. The package's table was made this way and has not been checked on a
device. Timing replaces it:

    python -m benchmarks.tune_gpu --save mquant_jax/assets/gpu_blocks.json
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.backend import prepare, sharding
from benchmarks.aot.devices import DEVICES
from benchmarks.aot.occupancy import analyse, candidates
from benchmarks.aot.sizes import MODELS
from benchmarks.output import add_output_options, deliver, save
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.errors import UserError
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import gpu, xla
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.pallas_gpu import Blocks, matmul, partial_sums
from mquant_jax.presets import PRESETS
from mquant_jax.target import Target, target

ROWS = (1, 1024)
Product = tuple[int, int, int]  # rows, out, in
_END = Epilogue(dtype=jnp.bfloat16)
REHEARSED: list[Product] = [(1, 64, 64), (32, 64, 64)]
# A timed program multiplies by the layers of a stack one after the other, as a model does: weights
# do not stay in the L2 cache (50 MB on an H100), and launch overhead does not dominate.
STACK_BYTES, _IN_A_ROW, _PASSES, _RUNS = 2**28, 8, 4, 5
# Defaults for shapes without an entry: small enough for any chip, and free of spills.
CLASSES = [
    {"rows": gpu.FEW_ROWS, "out": None, "path": gpu.FEW, "blocks": [64, 16, 64, 4, 4, 4]},
    {"rows": 64, "out": None, "path": gpu.MANY, "blocks": [64, 64, 64, 4, 3, 1]},
    {"rows": None, "out": 2048, "path": gpu.MANY, "blocks": [128, 128, 64, 8, 3, 1]},
    {"rows": None, "out": None, "path": gpu.MANY, "blocks": [256, 128, 64, 8, 3, 1]},
]


def shapes_of(model: str) -> list[tuple[int, int]]:
    """Return ``(out, in)`` of every distinct 4-bit product with one scale per channel in a
    model."""
    family = family_for(MODELS[model], model)
    config = family.config_from_hf(MODELS[model])
    params = abstract_params(abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16))
    return sorted(
        {
            (value.out_features, value.in_features)
            for value in params.values()
            if isinstance(value, QWeight) and _suits(value) and value.out_features > 1
        }
    )


def _suits(w: QWeight) -> bool:
    size = w.bits, w.groups, w.in_features, w.values.size
    return gpu.refuses(*size, Target.named("gpu")) is None


def layers_of(out: int, k: int) -> int:
    """Return the number of layers of a stack too large for any cache; a multiple of
    :data:`_IN_A_ROW`."""
    return _IN_A_ROW * max(1, min(16, STACK_BYTES // (out * k // 2 * _IN_A_ROW)))


def seconds(call: Callable[[QTensor, QWeight], jax.Array], x: QTensor, stack: QWeight) -> float:
    """Return the time of one product ``call(x, one layer of stack)``: the median over :data:`_RUNS`
    programs, each running :data:`_PASSES` times through all layers."""
    layers = stack.values.shape[0]

    @jax.jit
    def program(x: QTensor, stack: QWeight) -> tuple[jax.Array, ...]:
        def products(i: jax.Array, _: Any) -> tuple[jax.Array, ...]:
            first = i * _IN_A_ROW % layers
            weights = [dataclasses.replace(stack, layer=first + j) for j in range(_IN_A_ROW)]
            return tuple(call(x, w) for w in weights)  # return all, or XLA drops the unused ones

        like = jax.eval_shape(products, 0, None)
        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), like)
        return jax.lax.fori_loop(0, _PASSES * layers // _IN_A_ROW, products, zeros)

    jax.block_until_ready(program(x, stack))
    taken = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(program(x, stack))
        taken.append((time.perf_counter() - start) / (_PASSES * layers))
    return statistics.median(taken)


def timed(rows: int, out: int, k: int, interpret: bool = False) -> Iterator[dict[str, Any]]:
    """Time XLA's product of one shape, then each candidate; yield one entry per measurement.

    The block sizes in the current table come first. Candidates that the compiler refuses are left
    out. ``interpret`` runs the kernels without a GPU.

    Raises:
        UserError: a kernel's result differs from XLA's.
    """
    rng = np.random.default_rng(0)
    x = QTensor(jnp.asarray(rng.integers(-128, 128, (rows, k)), jnp.int8), jnp.float32(0.01))
    packed = jnp.asarray(rng.integers(0, 256, (layers_of(out, k), out, -(-k // 2))), jnp.uint8)
    scale = jnp.full((len(packed), out, 1), 0.01, jnp.float32)
    stack = QWeight(packed, scale, k, 4, "packed")
    last = dataclasses.replace(stack, layer=jnp.int32(len(packed) - 1))

    def by_xla(x: QTensor, w: QWeight) -> jax.Array:
        return xla.packed_int_dot(x, w.of_layer()).astype(jnp.bfloat16)

    yield {"path": gpu.XLA, "us": seconds(by_xla, x, stack) * 1e6}
    expected = np.asarray(jax.jit(by_xla)(x, last), np.float32)
    many = rows > gpu.FEW_ROWS
    for blocks in ordered(rows, out, k):
        call = _form(many, blocks, interpret)
        try:
            got = np.asarray(jax.jit(call)(x, last), np.float32)
        except jax.errors.JaxRuntimeError as e:
            print(f"  {blocks}: {str(e).splitlines()[0][:80]}", file=sys.stderr)
            continue
        if not np.allclose(got, expected, rtol=0.01, atol=1e-3 * np.abs(expected).max()):
            raise UserError(f"{blocks} computes something else than XLA at {rows} x {out} x {k}")
        path = gpu.MANY if many else gpu.FEW
        cut = list(dataclasses.astuple(blocks))
        yield {"path": path, "blocks": cut, "us": seconds(call, x, stack) * 1e6}


def ordered(rows: int, out: int, k: int) -> list[Blocks]:
    """Return the candidates for one shape, the one in the current table first."""
    found, chosen = candidates(rows > gpu.FEW_ROWS, rows), gpu.choose(rows, out, k).blocks
    first = [Blocks(*chosen)] if chosen else []
    return first + [blocks for blocks in found if blocks not in first]


def _form(many: bool, blocks: Blocks, interpret: bool) -> Callable[[QTensor, QWeight], jax.Array]:
    if many:
        return lambda x, w: matmul(
            x, w.values, w.scale, blocks, _END, layer=w.layer, interpret=interpret
        )

    def few(x: QTensor, w: QWeight) -> jax.Array:
        parts = partial_sums(x.values, w.values, blocks, layer=w.layer, interpret=interpret)
        scale = x.scale * w.of_layer().scale[:, 0]
        return (parts.sum(0).astype(jnp.float32) * scale).astype(jnp.bfloat16)

    return few


def analysed(rows: int, out: int, k: int, where: Any) -> list[dict[str, Any]]:
    """Return the candidates for one shape ranked by analysis, best first."""
    path = gpu.MANY if rows > gpu.FEW_ROWS else gpu.FEW
    return [{"path": path, **entry} for entry in analyse(rows, out, k, where)]


def tune(
    models: list[str], rows: list[int], ahead_of_time: bool, limit: float, file: Path | None
) -> dict[str, Any]:
    """Return the table.

    Args:
        limit: time in seconds after which no further candidate is started.
        file: rewritten with the table so far while candidates are timed.

    Raises:
        UserError: there is no NVIDIA GPU to time on, or no compiler to analyse with.
    """
    products = [
        (n, *shape)
        for shape in sorted({shape for model in models for shape in shapes_of(model)})
        for n in sorted({gpu.bucket(n) for n in rows})
    ]
    if ahead_of_time:
        return _analyse_all(products)
    if not target().kernels_for_gpu:
        raise UserError(
            "timing needs an NVIDIA GPU (Ampere or later) and jax[cuda13]; pass "
            "--ahead-of-time to rank without a GPU"
        )
    return time_all(products, limit, file)


def _analyse_all(products: list[Product]) -> dict[str, Any]:
    prepare(DEVICES["h100"])
    where = sharding(DEVICES["h100"])
    entries = []
    for n, out, k in products:
        print(f"{n} x {out} x {k}", file=sys.stderr)
        if found := analysed(n, out, k, where):
            entries.append({"rows": n, "out": out, "in": k, **found[0]})
    origin = (
        "Ahead-of-time analysis for an H100: registers, spills and shared memory as the "
        "compiler reports them, the rest arithmetic (benchmarks/aot/occupancy.py). No device "
        "has run any of it."
    )
    return {"origin": origin, "shapes": entries, "classes": CLASSES}


def time_all(
    products: list[Product], limit: float, file: Path | None, interpret: bool = False
) -> dict[str, Any]:
    """Time all products' candidates in turn: XLA's for each product, then each product's first
    candidate, and so on. A run that ends early then has a result for every product.

    Args: see :func:`tune`.
    """
    start, best = time.perf_counter(), {}
    running = {product: timed(*product, interpret) for product in products}
    while running:
        for product in list(running):
            if time.perf_counter() - start > limit:
                return _timed_table(best, "Time was up before all candidates were timed.", file)
            entry = next(running[product], None)
            if entry is None:
                del running[product]
                continue
            best[product] = min(best.get(product, entry), entry, key=lambda e: e["us"])
            _timed_table(best, "Timing was not finished.", file)
    return _timed_table(best, "Every candidate was timed.", file)


def _timed_table(
    best: dict[Product, dict[str, Any]], note: str, file: Path | None
) -> dict[str, Any]:
    """Return the table of the fastest so far, and save it to ``file``."""
    origin = f"Timed on {jax.devices()[0].device_kind}, jax {jax.__version__}. {note}"
    shapes = [{"rows": n, "out": out, "in": k, **e} for (n, out, k), e in best.items()]
    result = {"origin": origin, "shapes": shapes, "classes": CLASSES}
    save(result, file)
    return result


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
    lines = [result["origin"], "", f"{'rows':>6} {'out':>7} {'in':>7} {'us':>8}  path, blocks"]
    for entry in result["shapes"]:
        us = entry.get("us", entry.get("score_us"))
        lines.append(f"{entry['rows']:>6} {entry['out']:>7} {entry['in']:>7} {us:>8.1f}  "
                     f"{entry['path']} {entry.get('blocks', '')}")  # fmt: skip
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.tune_gpu", __doc__ or "")
    add = parser.add_argument
    add("--model", action="append", choices=tuple(MODELS), help="take the shapes of this model; "
        "repeatable (default qwen2_vl-7b)")  # fmt: skip
    add("--rows", action="append", type=int, metavar="N", help="activation rows, rounded up to a "
        f"power of two; repeatable (default {' and '.join(map(str, ROWS))})")  # fmt: skip
    add("--ahead-of-time", action="store_true", help="rank by analysis; needs no GPU")
    add("--seconds", type=float, default=math.inf, metavar="S", help="start no candidate after "
        "this time (default: time all of them)")  # fmt: skip
    add("--rehearse", action="store_true", help="time two tiny products with interpreted "
        "kernels, to test this command without a GPU; the times mean nothing")  # fmt: skip
    add_output_options(parser)
    args = parser.parse_args(argv)
    if any(n < 1 for n in args.rows or ()):
        raise UserError("--rows must be 1 or more")
    if not args.seconds > 0:
        raise UserError("--seconds must be more than 0")
    if args.rehearse:
        deliver(time_all(REHEARSED, args.seconds, args.save, interpret=True), args, table)
        return OK
    models, rows = args.model or ["qwen2_vl-7b"], args.rows or list(ROWS)
    result = tune(models, rows, args.ahead_of_time, args.seconds, args.save)
    deliver(result, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
