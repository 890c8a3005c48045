"""Online rotations and the quantisation that follows them; chooses the implementation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.hadamard import LANES, Rotation
from mquant_jax.numerics import QTensor, quantize_dynamic, quantize_static
from mquant_jax.ops.dense import early_tpu, platform
from mquant_jax.ops.gpu import suits_device

FEWEST_ROWS = 64  # below, the kernel's fixed cost is not worth it
# Rows that a core's cache holds from the first product to the last; fewer where they do not divide.
BLOCKS = (64, 32)
WIDEST_OUTER = 160  # of what a GPU's shared memory holds beside a row


def select_path(rotation: Rotation, rows: int, dtype) -> str:
    """Name of the form that :func:`rotate` and :func:`rotate_quantize` run: ``pallas_tpu`` or
    ``pallas_gpu`` for many bfloat16 rows if the rotation has one block with an inner factor of 128
    (and, on GPU, an outer one that fits the chip's shared memory); ``blocks`` for many rows on CPU;
    else ``xla``."""
    if platform() == "cpu":
        return "blocks" if _block(rows) else "xla"
    fits = rotation.blocks == 1 and rotation.inner == LANES and dtype == jnp.bfloat16
    if not fits or rows < FEWEST_ROWS:
        return "xla"
    if platform() == "gpu":
        return "pallas_gpu" if rotation.outer <= WIDEST_OUTER and suits_device() else "xla"
    return "pallas_tpu" if platform() == "tpu" and not early_tpu() else "xla"


def _block(rows: int) -> int | None:
    """Rows that go through a rotation at a time, if not all do."""
    return next((size for size in BLOCKS if rows % size == 0 and rows > size), None)


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _row_by_row(x: jax.Array, rotation: Rotation) -> jax.Array:
    """A rotation of ``[rows, inputs]``, signs apart, whose outer factor is one small product for
    each row: as one product for all, XLA would transpose them to it and back."""
    x = rotation.padded(x)
    outer, inner = rotation.factors(x.dtype)
    y = (x.reshape(-1, rotation.inner) @ inner).reshape(-1, rotation.outer, rotation.inner)
    each = jnp.broadcast_to(outer.T, (len(y), *outer.shape))
    return jax.lax.dot_general(each, y, (((2,), (1,)), ((0,), (0,)))).reshape(x.shape)


def _by_blocks(x: jax.Array, rotation: Rotation, end: Callable[..., Any], *more: jax.Array) -> Any:
    """What ``end`` makes of rotated ``x [..., inputs]``, a block of rows at a time, with the same
    rows of ``more [rows, ...]``."""
    # Before the loop, the signs fuse with the producer of the rows.
    flat, size = rotation.signed(x).reshape(-1, x.shape[-1]), _block(_rows(x))
    parts = jax.lax.map(
        lambda a: end(_row_by_row(a[0], rotation), *a[1:]),
        tuple(a.reshape(-1, size, *a.shape[1:]) for a in (flat, *more)),
    )
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), parts)


def _kernel(x: jax.Array, rotation: Rotation, scale: jax.Array | None = None) -> jax.Array:
    # Not needed, and slow to import, elsewhere.
    name = "rotate_gpu" if platform() == "gpu" else "pallas_tpu"
    kernels = importlib.import_module(f"mquant_jax.ops.{name}")

    x = rotation.signed(x)
    x = rotation.padded(x) if rotation.inputs % LANES else x  # whole tiles the kernel pads itself
    flat = kernels.rotate(x.reshape(-1, x.shape[-1]), rotation.outer, scale)
    return flat.reshape(*x.shape[:-1], rotation.n)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """float ``[..., inputs]`` -> ``[..., n]`` in the same type."""
    form = select_path(rotation, _rows(x), x.dtype)
    if form == "blocks":
        return _by_blocks(x, rotation, lambda y: y)
    return rotation(x) if form == "xla" else _kernel(x, rotation)


def rotate_quantize(x: jax.Array, rotation: Rotation, scale: jax.Array | None) -> QTensor:
    """:func:`rotate`, then int8.

    Args:
        x: float ``[..., inputs]``.
        scale: float32, one number or ``[..., 1]``, per row; ``None``: found from each row.
    """
    form = select_path(rotation, _rows(x), x.dtype)
    if form == "blocks" and scale is None:
        return _by_blocks(x, rotation, quantize_dynamic)
    if form == "xla" or scale is None:
        y = rotate(x, rotation)
        return quantize_dynamic(y) if scale is None else quantize_static(y, scale)
    rows = jnp.broadcast_to(scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    if form != "blocks":
        return QTensor(_kernel(x, rotation, rows), scale)
    values = _by_blocks(x, rotation, lambda y, s: quantize_static(y, s).values, rows)
    return QTensor(values, scale)
