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

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops.xla import finish

MANY, FEW, XLA = "pallas_gpu", "pallas_gpu_gemv", "int_dot"
PATHS = (MANY, FEW)
FEW_ROWS = 16  # up to here a product is a question of reading the weights
FEWEST_QUERIES = 64
WIDEST_HEAD = 128  # channels; wider ones do not fit the registers
_DEEPEST = 2**17 - 1  # inputs: 16 * 8 * 128 of each must add up to less than 2**31
_LARGEST = 2**31 - 1  # elements of an array: the kernels' lowering counts them in 32 bits
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


@functools.cache
def suits_device() -> bool:
    """Whether the kernels run on the GPU that is here, if one is: they want an NVIDIA one, Ampere
    or later."""
    if jax.default_backend() != "gpu":
        return True  # programs are compiled for another machine
    version = getattr(jax.devices()[0], "compute_capability", "")
    major = str(version).split(".")[0]
    return major.isdigit() and int(major) >= 8  # AMD's is a name


def suits(w: QWeight) -> bool:
    """Whether the kernels take a weight or a stack of them; shapes, bits and groups count."""
    fits = w.values.size <= _LARGEST and w.in_features <= _DEEPEST
    return w.bits == 4 and w.groups == 1 and fits and suits_device()


def suits_attention(q: jax.Array, k: jax.Array | QTensor, prefix: Any) -> bool:
    """Whether attention ``[B, heads, T, d]`` runs as one kernel: for many queries in a half
    precision, a cache that is not int8, and heads as wide as are usual."""
    plain = prefix is None and not isinstance(k, QTensor)
    shape = q.shape[2] >= FEWEST_QUERIES and q.shape[3] <= WIDEST_HEAD
    return plain and shape and q.dtype in (jnp.bfloat16, jnp.float16) and suits_device()


def suits_decoding(q: jax.Array, values: jax.Array | QTensor, prefix: Any) -> bool:
    """Whether attention ``[B, heads, T, d]`` to a cache runs as one kernel: for one query in a half
    precision, of heads whose channels are cut evenly, and values that can be counted."""
    size = (values.values if isinstance(values, QTensor) else values).size
    shape = q.shape[2] == 1 and q.shape[3] <= WIDEST_HEAD and q.shape[3] % 16 == 0
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return prefix is None and shape and half and size <= _LARGEST and suits_device()


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


def dense(
    x: QTensor,
    w: QWeight,
    bias: jax.Array | None,
    residual: jax.Array | None,
    dtype,
    gate: jax.Array | None = None,
) -> jax.Array:
    """A whole dense layer, ``dtype [rows, out]``, by the kernel that :func:`choose` names.

    Args:
        x: int8 ``[rows, in]``; its scale is one number or ``[rows, 1]``.
        w: packed, of one layer or in the stack of all.
        residual, gate: ``dtype [rows, out]``.
    """
    from mquant_jax.ops import pallas_gpu  # not needed, and slow to import, where there is no GPU

    rows = x.values.shape[0]
    choice = choose(rows, w.out_features, w.in_features)
    assert choice.blocks is not None, "the caller asks for a kernel only where the table has one"
    blocks = pallas_gpu.Blocks(*choice.blocks)
    if choice.path == MANY:
        return pallas_gpu.matmul(
            x.values, w.values, x.scale, w.scale, blocks,
            layer=w.layer, bias=bias, gate=gate, residual=residual, dtype=dtype,
        )  # fmt: skip
    sums = pallas_gpu.partial_sums(x.values, w.values, blocks, layer=w.layer).sum(0)
    y = sums.astype(jnp.float32) * (x.scale * w.of_layer().scale[:, 0])
    return finish(y, bias, residual, dtype, gate)
