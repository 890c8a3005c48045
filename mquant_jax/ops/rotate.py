"""Online rotations and the quantisation that follows; the forms, best first: :data:`ROTATE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.hadamard import LANES, Rotation
from mquant_jax.numerics import QTensor, Scale, quantize_dynamic, quantize_static
from mquant_jax.ops.registry import Form, Op, unless
from mquant_jax.shapes import Array, Float
from mquant_jax.target import Target, target

# Rows that a core's cache holds from the first product to the last; fewer where they do not divide.
BLOCKS = (64, 32)
# Rows from which on XLA's CPU products of any number of rows sum in the same order.
_LEAST_TOGETHER = 64


@dataclasses.dataclass(frozen=True)
class Rotated:
    """A rotation of ``rows`` rows."""

    rows: int
    rotation: Rotation
    dtype: Any


def _no_cpu(r: Rotated, to: Target) -> str | None:
    return unless((to.platform == "cpu", "not a CPU"))


def _no_kernel(r: Rotated, to: Target, platform: str) -> str | None:
    least, widest = to.limits.rotation_rows, to.limits.rotation_outer
    own = to.kernels_for_gpu if platform == "gpu" else not to.early_tpu
    blocks, inner, outer = r.rotation.blocks, r.rotation.inner, r.rotation.outer
    return unless(
        (to.platform == platform and own, f"not a {platform.upper()} that the kernel is for"),
        (blocks == 1 and inner == LANES, f"{blocks} block(s) with an inner factor of {inner}"),
        (r.dtype == jnp.bfloat16, f"{r.dtype}, not bfloat16"),
        (r.rows >= least, f"{r.rows} rows; the least is {least}"),
        (platform == "tpu" or outer <= widest, f"an outer factor of {outer}; the most is {widest}"),
    )


def _block(rows: int) -> int | None:
    """Rows that go through a rotation at a time, if not all do."""
    return next((size for size in BLOCKS if rows % size == 0 and rows > size), None)


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _row_by_row(x: jax.Array, rotation: Rotation) -> jax.Array:
    """A rotation of ``[rows, inputs]``, without signs; a row has the same bits beside any others.

    The inner factor is one product for all rows. The outer one is a small product for each row: as
    one for all, XLA would transpose them to it and back.
    """
    x = rotation.padded(x)
    outer, inner = rotation.factors(x.dtype)
    rows = x.reshape(-1, rotation.inner)
    missing = max(_LEAST_TOGETHER - len(rows), 0)
    y = jnp.pad(rows, ((0, missing), (0, 0))) @ inner
    y = y[: len(rows)].reshape(-1, rotation.outer, rotation.inner)
    each = jnp.broadcast_to(outer.T, (len(y), *outer.shape))
    return jax.lax.dot_general(each, y, (((2,), (1,)), ((0,), (0,)))).reshape(x.shape)


def _by_blocks(x: jax.Array, rotation: Rotation, end: Callable[..., Any], *more: jax.Array) -> Any:
    """What ``end`` makes of rotated ``x [..., inputs]``, a block of rows at a time, with the same
    rows of ``more [rows, ...]``."""
    # Before the loop, the signs fuse with the producer of the rows.
    flat, size = rotation.signed(x).reshape(-1, x.shape[-1]), _block(_rows(x))
    if size is None:
        y = end(_row_by_row(flat, rotation), *more)
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), y)
    parts = jax.lax.map(
        lambda a: end(_row_by_row(a[0], rotation), *a[1:]),
        tuple(a.reshape(-1, size, *a.shape[1:]) for a in (flat, *more)),
    )
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), parts)


def _kernel(x: jax.Array, rotation: Rotation, scale: jax.Array | None = None) -> jax.Array:
    """By the target's kernel, quantised where ``scale [rows, 1]`` says how."""
    rotate: Callable[..., jax.Array]
    if target().platform == "gpu":  # not needed, and slow to import, elsewhere
        from mquant_jax.ops.rotate_gpu import rotate
    else:
        from mquant_jax.ops.pallas_tpu import rotate
    x = rotation.signed(x)
    x = rotation.padded(x) if rotation.inputs % LANES else x  # whole tiles the kernel pads itself
    flat = rotate(x.reshape(-1, x.shape[-1]), rotation.outer, scale, interpret=target().interpret)
    return flat.reshape(*x.shape[:-1], rotation.n)


def _whole(x: jax.Array, rotation: Rotation, quantise: bool, scale: jax.Array | None) -> Any:
    return _quantised(rotation(x), quantise, scale)


def _quantised(y: jax.Array, quantise: bool, scale: jax.Array | None) -> Any:
    if not quantise:
        return y
    return quantize_dynamic(y) if scale is None else quantize_static(y, scale)


def _in_blocks(x: jax.Array, rotation: Rotation, quantise: bool, scale: jax.Array | None) -> Any:
    if scale is None:
        return _by_blocks(x, rotation, partial(_quantised, quantise=quantise, scale=None))
    values = _by_blocks(x, rotation, lambda y, s: quantize_static(y, s).values, _per_row(x, scale))
    return QTensor(values, scale)


def _by_kernel(x: jax.Array, rotation: Rotation, quantise: bool, scale: jax.Array | None) -> Any:
    if scale is not None:
        return QTensor(_kernel(x, rotation, _per_row(x, scale)), scale)
    return _quantised(_kernel(x, rotation), quantise, scale)


def _per_row(x: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 ``[rows, 1]``."""
    return jnp.broadcast_to(scale, (*x.shape[:-1], 1)).reshape(-1, 1)


ROTATE: Op[Rotated] = Op(
    "rotation",
    Form("rows_cpu", _in_blocks, _no_cpu),
    Form("pallas_gpu", _by_kernel, partial(_no_kernel, platform="gpu")),
    Form("pallas_tpu", _by_kernel, partial(_no_kernel, platform="tpu")),
    Form("xla", _whole),
)


def rotate(x: Float[Array, "*batch inputs"], rotation: Rotation) -> Float[Array, "*batch n"]:
    """Rotated rows, in the same type."""
    return ROTATE.pick(Rotated(_rows(x), rotation, x.dtype))(x, rotation, False, None)


def rotate_quantize(
    x: Float[Array, "*batch inputs"], rotation: Rotation, scale: Scale | None
) -> QTensor:
    """:func:`rotate`, then int8 by ``scale``; ``None``: found from each row."""
    return ROTATE.pick(Rotated(_rows(x), rotation, x.dtype))(x, rotation, True, scale)
