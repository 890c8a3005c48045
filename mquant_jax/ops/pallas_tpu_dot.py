"""Dense layers as Pallas kernels for TPU: int8 activations by integer weights, with the epilogue.

Both kernels read their layer from the stack of all layers and widen weights one block of output
channels at a time (the compiler has no mixed product). ``int4_dot``, for many rows, keeps the rows
on the chip while weights stream in. ``few_dot`` puts the weights on the left of the product, where
they stream through the matrix units as fast as memory delivers them; on the right they would be
loaded into the units.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mquant_jax.hadamard import LANES
from mquant_jax.numerics import QTensor
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.shapes import Array, Float, Float32, Int, Int32

NAME, NAME_FEW = "int4_dot", "few_dot"
LONGEST = 10240  # input channels: so many rows' worth of them stay on the chip, twice
# Entries of a weight up to which XLA's product is the slower one. It is 3 % behind at most beyond,
# and joins what follows (an activation, a gate) to the product, which a kernel would not.
LARGEST = 2**24
_ROWS, _CHUNK = 1024, 256  # that stay on the chip; that are multiplied at a time
_TILE = 32  # rows of an int8 register tile
_BLOCK = 5 * 2**18  # bytes of a weight that are fetched together for few rows
_VMEM = 48 * 2**20


def suits(in_features: int, out_features: int) -> bool:
    """Whether :func:`int4_dot` takes these shapes, and is the faster form.

    Layers that widen are followed by an activation, which XLA fuses; they are left to it.
    """
    small = in_features * out_features <= LARGEST and out_features <= in_features <= LONGEST
    return suits_few(in_features, out_features) and small


def suits_few(in_features: int, out_features: int) -> bool:
    """Whether :func:`few_dot` takes these shapes; up to a register's lanes of rows, it is the
    faster form for all that it takes."""
    return in_features % LANES == 0 and out_features % LANES == 0


def int4_dot(
    x: QTensor,
    stack: Int[Array, "layers out in"],
    layer: Int32[Array, ""],
    w_scale: Float32[Array, "layers out"],
    end: Epilogue,
    *,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """``x @ stack[layer].T`` in int32, times scales, and the epilogue.

    Args:
        x: int8 ``[rows, in]``; its scale is one number or ``[rows, 1]``.
        stack: of 4-bit values; ``out`` and ``in`` are multiples of 128.
        layer: slicing it out before the kernel would copy it.
        end: without a gate: layers with one widen, and those are left to XLA where there are many
            rows.
    """
    assert end.gate is None
    (rows, k), x_scale = x.values.shape, x.scale
    out = stack.shape[1]
    tall = min(_ROWS, -(-rows // _TILE) * _TILE)
    wide = 2 * LANES if out % (2 * LANES) == 0 else LANES
    blocks = -(-rows // tall)
    pad = ((0, blocks * tall - rows), (0, 0))
    per_row = x_scale.ndim > 0
    operands = {
        "x": (jnp.pad(x.values, pad), pl.BlockSpec((tall, k), lambda i, j, _: (i, 0))),
        "w": (stack, pl.BlockSpec((None, wide, k), lambda i, j, layer: (layer[0], j, 0))),
        "column": (
            w_scale[:, None], pl.BlockSpec((None, 1, wide), lambda i, j, layer: (layer[0], 0, j))
        ),
        "scale": (
            jnp.pad(x_scale, pad) if per_row else x_scale.reshape(1, 1),
            pl.BlockSpec((tall, 1), lambda i, j, _: (i, 0)) if per_row else _one(),
        ),
    }  # fmt: skip
    if end.bias is not None:
        operands["bias"] = end.bias[None], pl.BlockSpec((1, wide), lambda i, j, _: (0, j))
    tile = pl.BlockSpec((tall, wide), lambda i, j, _: (i, j))
    if end.residual is not None:
        operands["residual"] = jnp.pad(end.residual, pad), tile
    size = jnp.dtype(end.dtype).itemsize
    result = _call(
        NAME, _kernel, layer, operands, (blocks, out // wide), tile,
        jax.ShapeDtypeStruct((blocks * tall, out), end.dtype),
        flops=2 * blocks * tall * out * k,
        moved=blocks * tall * (k + out * size) + blocks * out * k // 2,
        interpret=interpret,
    )  # fmt: skip
    return result[:rows]


def few_dot(
    x: QTensor,
    stack: Int[Array, "layers out in"],
    layer: Int32[Array, ""],
    w_scale: Float32[Array, "layers out"],
    end: Epilogue,
    *,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """:func:`int4_dot` of up to 128 rows, by a stack of int4 or int8, with any epilogue."""
    (rows, k), x_scale = x.values.shape, x.scale
    out = stack.shape[1]
    row = k * jnp.iinfo(stack.dtype).bits // 8
    fitting = (n for n in range(LANES, out + 1, LANES) if out % n == 0 and n * row <= _BLOCK)
    wide = max(fitting, default=LANES)
    per_row = x_scale.ndim > 0
    whole = pl.BlockSpec((rows, k), lambda j, _: (0, 0))
    tile = pl.BlockSpec((rows, wide), lambda j, _: (0, j))
    operands = {
        "x": (x.values, whole),
        "w": (stack, pl.BlockSpec((None, wide, k), lambda j, layer: (layer[0], j, 0))),
        "column": (
            w_scale[:, None], pl.BlockSpec((None, 1, wide), lambda j, layer: (layer[0], 0, j))
        ),
        "scale": (
            x_scale if per_row else x_scale.reshape(1, 1),
            pl.BlockSpec((rows, 1), lambda j, _: (0, 0)) if per_row else _one(),
        ),
    }  # fmt: skip
    if end.bias is not None:
        operands["bias"] = end.bias[None], pl.BlockSpec((1, wide), lambda j, _: (0, j))
    if end.gate is not None:
        operands["gate"] = end.gate, tile
    if end.residual is not None:
        operands["residual"] = end.residual, tile
    size = jnp.dtype(end.dtype).itemsize
    return _call(
        NAME_FEW, _kernel_few, layer, operands, (out // wide,), tile,
        jax.ShapeDtypeStruct((rows, out), end.dtype),
        flops=2 * LANES * out * k,  # as the matrix units do it
        moved=rows * (k + out * size) + out * row,
        interpret=interpret,
    )  # fmt: skip


def _one() -> pl.BlockSpec:
    """One number, for every block."""
    return pl.BlockSpec((1, 1), lambda *_: (0, 0))


def _call(name, kernel, layer, operands, grid, out_spec, out_shape, *, flops, moved, interpret):
    values, specs = zip(*operands.values(), strict=True)
    return pl.pallas_call(
        partial(_named, kernel=kernel, names=tuple(operands)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=specs, out_specs=out_spec
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(grid), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(layer[None], *values)


def _named(layer_ref, *refs, kernel, names: tuple[str, ...]) -> None:
    *inputs, out_ref = refs
    kernel(dict(zip(names, inputs, strict=True)), out_ref)


def _kernel(refs, out_ref) -> None:
    w = refs["w"][...].astype(jnp.int8)
    tall = out_ref.shape[0]
    for start in range(0, tall, _CHUNK):
        at = pl.ds(start, min(_CHUNK, tall - start))
        total = jax.lax.dot_general(
            refs["x"][at], w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        _end(total.astype(jnp.float32), at, refs, out_ref)


def _kernel_few(refs, out_ref) -> None:
    rows = out_ref.shape[0]
    x = refs["x"][...]
    if rows == 1:  # no vector is multiplied by the matrix units
        x = jnp.broadcast_to(x, (_TILE, x.shape[1]))
    total = jax.lax.dot_general(
        refs["w"][...].astype(jnp.int8), x, (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )  # fmt: skip
    _end(total.astype(jnp.float32).T[:rows], slice(None), refs, out_ref)


def _end(y: jax.Array, at, refs, out_ref) -> None:
    """The epilogue of a product: ``y`` float32, rows ``at`` of the result. Each step rounds to the
    result's type, as separate steps would."""
    scale, dtype = refs["scale"], out_ref.dtype
    scale = scale[at] if scale.shape[0] == out_ref.shape[0] else scale[...]
    y = y * (scale * refs["column"][...])
    if "bias" in refs:
        y = y + refs["bias"][...].astype(jnp.float32)
    y = y.astype(dtype)
    for name in ("gate", "residual"):
        if name in refs:
            other, y = refs[name][at].astype(jnp.float32), y.astype(jnp.float32)
            y = (jax.nn.silu(other) * y if name == "gate" else other + y).astype(dtype)
    out_ref[at] = y
