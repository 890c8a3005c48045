"""Which products run as kernels on GPU, and cut how: a table, and the call of the kernel.

The table is ``mquant_jax/assets/gpu_blocks.json``; its own words say where its figures come from.
``python -m benchmarks.tune_gpu`` writes one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib.resources import files
from typing import Any

import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.registry import unless
from mquant_jax.shapes import Array, Float
from mquant_jax.target import Target, target

MANY, FEW, XLA = "pallas_gpu", "pallas_gpu_gemv", "int_dot"
PATHS = (MANY, FEW)
FEW_ROWS = 16  # up to here a product is a question of reading the weights
TABLE = "assets/gpu_blocks.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """``path`` is one of :data:`PATHS` with the kernel's ``blocks``, or ``int_dot`` without."""

    path: str
    blocks: tuple[int, ...] | None


@functools.cache
def table() -> dict[str, Any]:
    """The table as its file has it."""
    return json.loads((files("mquant_jax") / TABLE).read_text(encoding="utf-8"))


def refuses(bits: int, groups: int, in_features: int, elements: int, to: Target) -> str | None:
    """Why the kernels do not take a weight or a stack of ``elements`` values."""
    return unless(
        (to.kernels_for_gpu, "not an NVIDIA GPU from Ampere on"),
        (bits == 4 and groups == 1, "not 4 bits with a scale per channel"),
        (elements <= to.limits.gpu_elements and in_features <= to.limits.gpu_inputs,
         "too large for 32-bit indices or sums"),
    )  # fmt: skip


def bucket(rows: int) -> int:
    """Rows as the table counts them: the next power of two."""
    return 1 << (rows - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def choose(rows: int, out: int, in_features: int) -> Choice:
    """The table's entry for a product: its exact shape's, or that of the first class with it."""
    for entry in table()["shapes"]:
        if (bucket(rows), out, in_features) == (entry["rows"], entry["out"], entry["in"]):
            return _choice(entry)
    for entry in table()["classes"]:
        if rows <= (entry["rows"] or rows) and out <= (entry["out"] or out):
            return _choice(entry)
    return Choice(XLA, None)


def _choice(entry: dict[str, Any]) -> Choice:
    blocks = entry.get("blocks")
    return Choice(entry["path"], tuple(blocks) if blocks else None)


def _blocks(x: QTensor, w: QWeight) -> Any:
    """The table's blocks, for a product that the kernels take."""
    from mquant_jax.ops import pallas_gpu  # not needed, and slow to import, where there is no GPU

    blocks = choose(len(x.values), w.out_features, w.in_features).blocks
    assert blocks is not None, "a kernel is chosen only where the table has one"
    return pallas_gpu.Blocks(*blocks)


def many(x: QTensor, w: QWeight, end: Epilogue) -> Float[Array, "rows out"]:
    """A whole dense layer in one kernel.

    Args:
        x: int8 ``[rows, in]``; its scale is one number or ``[rows, 1]``.
        w: packed, of one layer or in the stack of all.
        end: for ``[rows, out]``.
    """
    from mquant_jax.ops import pallas_gpu

    blocks, interpret = _blocks(x, w), target().interpret
    return pallas_gpu.matmul(x, w.values, w.scale, blocks, end, layer=w.layer, interpret=interpret)


def few(x: QTensor, w: QWeight, end: Epilogue) -> Float[Array, "rows out"]:
    """:func:`many` for few rows: partial sums in a kernel, the rest in XLA."""
    from mquant_jax.ops import pallas_gpu

    blocks, interpret = _blocks(x, w), target().interpret
    sums = pallas_gpu.partial_sums(x.values, w.values, blocks, layer=w.layer, interpret=interpret)
    y = sums.sum(0).astype(jnp.float32) * (x.scale * w.of_layer().scale[:, 0])
    return end(y)
