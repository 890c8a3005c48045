"""Pallas kernels for NVIDIA GPUs (Ampere and later): products of int8 rows by packed int4 weights.

They go through Pallas' Triton lowering, which gives int8 tensor-core instructions from Ampere on
(``mma.sync``, ``wgmma`` on Hopper). Everything that depends on it is here and in the other modules
whose names end in ``_gpu``.

Weights are the matrix unit's first operand: they come from memory packed by halves (see
:mod:`~mquant_jax.numerics`), pass through registers, where a byte becomes two, and meet the rows,
which stay in shared memory. A byte holds column ``j`` and column ``j + half``, so that one block of
bytes is multiplied by two blocks of columns. Nibbles are not moved down but up or not at all: both
factors are 16 times the weight, and the sum is shifted once, which is exact for as many inputs as
:mod:`~mquant_jax.ops.gpu` lets in.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.numerics import QTensor
from mquant_jax.ops.blocks_gpu import load, sides, store, within
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.loops import int32_loop
from mquant_jax.shapes import Array, Float, Float32, Int8, Int32, UInt8

_TWO_OPERATIONS = "shl.b32 $0, $1, 4; and.b32 $0, $0, 0xf0f0f0f0;"  # on four bytes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        out: weight rows of a block, a power of two; 64 or more for ``wgmma``.
        rows: activation rows of a block, a power of two from 16 on.
        depth: bytes of a weight row that are read at a time, a power of two from 32 on.
        warps: of 32 threads, per block.
        stages: reads under way at a time.
        splits: blocks that share an output, each of which sums a part of the inputs.
    """

    out: int
    rows: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def matmul(
    x: QTensor,
    w: UInt8[Array, "*layers out bytes"],
    w_scale: Float32[Array, "*layers out 1"],
    blocks: Blocks,
    end: Epilogue,
    *,
    layer: Int32[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """``x @ w.T`` with scales and epilogue applied before anything is written.

    Args:
        x: int8 ``[rows, in]``, ``in`` up to 2**17 - 1; its scale is one number or ``[rows, 1]``.
        w: ``ceil(in/2)`` bytes a row; a stack with ``layer`` alone.
        layer: which one of a stack to read; the stack is not copied.
        end: its SiLU is computed in float32.
        interpret: run without a GPU.
    """
    (rows, k), out, dtype = x.values.shape, w.shape[-2], end.dtype
    operands = {
        "layer": _index(layer),
        "x": x.values,
        "w": _stack(w),
        "w_scale": _stack(w_scale)[..., 0],
    }
    operands["x_scale"] = x.scale.reshape(-1)
    optional = {"bias": end.bias, "gate": end.gate, "residual": end.residual}
    operands |= {name: a for name, a in optional.items() if a is not None}
    sheets = 1 + (end.gate is not None) + (end.residual is not None)
    size = jnp.dtype(dtype).itemsize
    moved = rows * k + out * w.shape[-1] + rows * out * size * sheets
    return _call(
        partial(_whole, names=tuple(operands), k=k, blocks=blocks, interpret=interpret),
        tuple(operands.values()),
        grid=(pl.cdiv(out, blocks.out), pl.cdiv(rows, blocks.rows)),
        result=jax.ShapeDtypeStruct((rows, out), dtype),
        blocks=blocks,
        flops=2 * rows * k * out,
        moved=moved + 4 * (out + x.scale.size),
        interpret=interpret,
    )


def partial_sums(
    x: Int8[Array, "rows in"],
    w: UInt8[Array, "*layers out bytes"],
    blocks: Blocks,
    *,
    layer: Int32[Array, ""] | None = None,
    interpret: bool = False,
) -> Int32[Array, "{blocks.splits} rows out"]:
    """``x @ w.T`` for few rows, which want more blocks than there are outputs for.

    Arguments are those of :func:`matmul`. The sums over :attr:`Blocks.splits` parts of the inputs
    are kept separate, and so are the scales: the reader of the result applies them in passing,
    which costs no kernel of its own.
    """
    (rows, k), out = x.shape, w.shape[-2]
    shape = blocks.splits, rows, out
    return _call(
        partial(_part, k=k, blocks=blocks, interpret=interpret),
        (_index(layer), x, _stack(w)),
        grid=(pl.cdiv(out, blocks.out), blocks.splits, pl.cdiv(rows, blocks.rows)),
        result=jax.ShapeDtypeStruct(shape, jnp.int32),
        blocks=blocks,
        flops=2 * rows * k * out,
        moved=rows * k + out * w.shape[-1] + 4 * blocks.splits * rows * out,
        interpret=interpret,
    )


def _index(layer: jax.Array | None) -> jax.Array:
    return jnp.zeros((1,), jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)


def _stack(a: jax.Array) -> jax.Array:
    return a if a.ndim == 3 else a[None]


def _call(kernel, operands, *, grid, result, blocks: Blocks, flops, moved, interpret) -> jax.Array:
    """One kernel on whole arrays; it finds its blocks itself, since which layer is not known
    before it runs."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=result,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        # The lowering drops the estimate; metadata stays with the compiled kernel.
        metadata={"flops": str(flops), "bytes_accessed": str(moved)},
        interpret=interpret,
        name="w4a8",
    )(*operands)


def _low(packed: jax.Array, interpret: bool) -> jax.Array:
    """16 times the low nibbles, as int8."""
    if interpret:
        return (packed << 4).astype(jnp.int8)
    # Shifts of bytes are done one by one; of four at a time where it is written out.
    (moved,) = plgpu.elementwise_inline_asm(
        _TWO_OPERATIONS,
        args=[packed],
        constraints="=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int8)],
    )
    return moved


def _sum(layer_ref, x_ref, w_ref, n, m, first, last, k: int, blocks: Blocks, interpret: bool):
    """int32 ``[blocks.out, blocks.rows]``: products summed over the blocks ``first`` to ``last`` of
    a weight row's bytes, for weight rows from ``n`` and activation rows from ``m`` on."""
    rows, (_, out, half) = x_ref.shape[0], w_ref.shape
    depth, layer = blocks.depth, layer_ref[0]
    some_out, some_rows = within(n, blocks.out, out), within(m, blocks.rows, rows)

    def columns(start, end: int):
        uneven = half % depth or k % 2
        return start + jnp.arange(depth, dtype=jnp.int32) < end if uneven else None

    def add(i, total):
        at = i * depth
        mask = sides(some_out, within(at, depth, half), (blocks.out, depth))
        packed = load(w_ref.at[layer, pl.ds(n, blocks.out), pl.ds(at, depth)], mask)
        high = (packed & jnp.uint8(0xF0)).astype(jnp.int8)
        for part, start, end in ((_low(packed, interpret), at, half), (high, half + at, k)):
            mask = sides(some_rows, columns(start, end), (blocks.rows, depth))
            block = load(x_ref.at[pl.ds(m, blocks.rows), pl.ds(start, depth)], mask)
            total += jax.lax.dot_general(
                part, block, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )
        return total

    total = int32_loop(first, last, add, jnp.zeros((blocks.out, blocks.rows), jnp.int32))
    return jax.lax.shift_right_arithmetic(total, jnp.int32(4))


def _whole(*refs, names: tuple[str, ...], k: int, blocks: Blocks, interpret: bool) -> None:
    """One block of :func:`matmul`."""
    *inputs, y_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    rows, out = y_ref.shape
    n, m = pl.program_id(0) * blocks.out, pl.program_id(1) * blocks.rows
    total = _sum(
        ref["layer"], ref["x"], ref["w"], n, m, 0, pl.cdiv(ref["w"].shape[-1], blocks.depth),
        k, blocks, interpret,
    )  # fmt: skip
    some_out, some_rows = within(n, blocks.out, out), within(m, blocks.rows, rows)
    at_n, at_m = pl.ds(n, blocks.out), pl.ds(m, blocks.rows)
    scale = load(ref["w_scale"].at[ref["layer"][0], at_n], some_out)[:, None]
    if ref["x_scale"].shape[0] == 1:
        scale = ref["x_scale"][0] * scale
    else:
        scale = load(ref["x_scale"].at[at_m], some_rows)[None, :] * scale
    y = total.astype(jnp.float32) * scale
    if "bias" in ref:
        y += load(ref["bias"].at[at_n], some_out).astype(jnp.float32)[:, None]
    y, mask = y.T, sides(some_rows, some_out, (blocks.rows, blocks.out))
    if "gate" in ref:
        gate = load(ref["gate"].at[at_m, at_n], mask).astype(jnp.float32)
        y *= gate / (1.0 + jnp.exp(-gate))
    y = y.astype(y_ref.dtype)
    if "residual" in ref:
        y = load(ref["residual"].at[at_m, at_n], mask) + y
    store(y_ref.at[at_m, at_n], y, mask)


def _part(layer_ref, x_ref, w_ref, y_ref, *, k: int, blocks: Blocks, interpret: bool) -> None:
    """One block of :func:`partial_sums`."""
    splits, rows, out = y_ref.shape
    n, split, m = pl.program_id(0) * blocks.out, pl.program_id(1), pl.program_id(2) * blocks.rows
    whole = pl.cdiv(w_ref.shape[-1], blocks.depth)
    share = pl.cdiv(whole, splits)
    first = split * share
    last = jnp.minimum(first + share, whole)
    total = _sum(layer_ref, x_ref, w_ref, n, m, first, last, k, blocks, interpret)
    some_out, some_rows = within(n, blocks.out, out), within(m, blocks.rows, rows)
    at = split, pl.ds(m, blocks.rows), pl.ds(n, blocks.out)
    store(y_ref.at[at], total.T, sides(some_rows, some_out, (blocks.rows, blocks.out)))
