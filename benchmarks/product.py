"""Compare one W4A8 product with the chip's peak rate.

    python -m benchmarks.product [--shape ROWS,OUT,IN]... [--json] [--save FILE]

Times one dense layer (int8 activations, int4 weights, bfloat16 result) as the package runs it on
this machine, and XLA's int8 and bfloat16 products of the same shape. ``tops`` counts a
multiply-add as two operations. ``of_peak`` is the share of the published int8 rate (H100 and H200
only). ``weight_gb_per_second`` is the relevant figure for a single row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.devices import DEVICES
from benchmarks.output import add_output_options, deliver, save
from benchmarks.tune_gpu import layers_of, seconds
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import xla
from mquant_jax.ops.dense import DENSE, Product, held, quantized_dot, reads_stacks
from mquant_jax.ops.epilogue import Epilogue

Shape = tuple[int, int, int]  # rows, out, in
SHAPES: tuple[Shape, ...] = ((4096, 8192, 8192), (1024, 18944, 3584), (1, 18944, 3584))
Call = Callable[[QTensor, QWeight], jax.Array]


def peak() -> float | None:
    """Return this device's published dense int8 operations per second, or ``None`` if unknown."""
    kind = jax.devices()[0].device_kind
    return DEVICES["h100"].rates["int8"] if any(n in kind for n in ("H100", "H200")) else None


def _w4a8(x: QTensor, w: QWeight) -> jax.Array:
    return quantized_dot(x, w, Epilogue(dtype=jnp.bfloat16))


def _w4a8_of_layer(x: QTensor, w: QWeight) -> jax.Array:
    return quantized_dot(x, w.of_layer(), Epilogue(dtype=jnp.bfloat16))


def _int8(x: QTensor, w: QWeight) -> jax.Array:
    return xla.int_dot(x, w.of_layer()).astype(jnp.bfloat16)


def _bfloat16(x: QTensor, w: QWeight) -> jax.Array:
    return xla.float_dot(x.values, w.of_layer().values)


def variants(rows: int, out: int, k: int) -> dict[str, tuple[Call, QTensor, QWeight]]:
    """Return name -> call, activations and a stack of weights whose layers are all equal."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-128, 128, (rows, k)), jnp.int8)
    x = QTensor(values, jnp.float32(0.01))
    layers = layers_of(out, k)

    def stack(bits: int) -> QWeight:
        top = 2 ** (bits - 1) - 1
        one = rng.integers(-top, top + 1, (out, k)).astype(np.int8)
        every = jnp.broadcast_to(jnp.asarray(one), (layers, out, k))
        return QWeight(every, jnp.full((layers, out, 1), 0.01, jnp.float32), k, bits, "int8")

    four, eight = held(stack(4)), stack(8)
    wide = QWeight(eight.values.astype(jnp.bfloat16), eight.scale, k, 8, "int8")
    ours = _w4a8 if reads_stacks(four) else _w4a8_of_layer
    return {
        "w4a8": (ours, x, four),
        "int8": (_int8, x, eight),
        "bfloat16": (_bfloat16, QTensor(values.astype(jnp.bfloat16), x.scale), wide),
    }


def timed(shape: Shape) -> dict[str, Any]:
    """Time one shape: one row per variant."""
    rows, out, k = shape
    best, result = peak(), {"rows": rows, "out": out, "in": k, "variants": {}}
    for name, (call, x, stack) in variants(*shape).items():
        taken = seconds(call, x, stack)
        rate = 2 * rows * out * k / taken
        result["variants"][name] = {
            "us": taken * 1e6, "tops": rate / 1e12, "of_peak": best and rate / best,
            "weight_gb_per_second": stack.values.nbytes / len(stack.values) / taken / 1e9,
        }  # fmt: skip
        if name == "w4a8":
            result["path"] = DENSE.choose(Product.of(rows, stack)).name
    return result


def measure(shapes: list[Shape], file: Path | None) -> dict[str, Any]:
    """Time all shapes; rewrite ``file`` after each."""
    out: dict[str, Any] = {"machine": machine(), "int8_peak": peak(), "shapes": []}
    for shape in shapes:
        out["shapes"].append(timed(shape))
        save(out, file)
    return out


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
    lines = [
        f"{'rows x out x in':<22}{'variant':<10}{'us':>10}{'TOP/s':>9}{'of peak':>9}{'GB/s':>8}"
    ]
    for entry in result["shapes"]:
        name = f"{entry['rows']} x {entry['out']} x {entry['in']}"
        for variant, v in entry["variants"].items():
            share = f"{v['of_peak']:.0%}" if v["of_peak"] else "-"
            lines.append(f"{name:<22}{variant:<10}{v['us']:>10.1f}{v['tops']:>9.1f}{share:>9}"
                         f"{v['weight_gb_per_second']:>8.0f}")  # fmt: skip
    return "\n".join(lines)


def parse_shape(text: str) -> Shape:
    """Parse ``"1,64,64"`` into (1, 64, 64).

    Raises:
        UserError: the text is not a shape.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UserError(f"--shape {text}: expected ROWS,OUT,IN, as in 1024,3584,3584")
    rows, out, k = map(int, parts)
    return rows, out, k


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.product", __doc__ or "")
    parser.add_argument("--shape", action="append", metavar="ROWS,OUT,IN",
                        help="repeatable (default: three shapes like Qwen2-VL-7B's)")  # fmt: skip
    add_output_options(parser)
    args = parser.parse_args(argv)
    shapes = [parse_shape(text) for text in args.shape or ()] or list(SHAPES)
    deliver(measure(shapes, args.save), args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
