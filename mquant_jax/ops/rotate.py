"""Online rotations and the quantisation behind them: which form runs is chosen here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.hadamard import LANES, Rotation
from mquant_jax.numerics import QTensor, quantize_static
from mquant_jax.ops.dense import platform
from mquant_jax.ops.gpu import suits_device

FEWEST_ROWS = 64  # below, the kernel's fixed cost is not worth it
WIDEST_OUTER = 160  # of what a GPU's shared memory holds beside a row


def select_path(rotation: Rotation, rows: int, dtype) -> str:
    """Name of the form that :func:`rotate` and :func:`rotate_quantize` run: ``pallas_tpu`` or
    ``pallas_gpu`` for many bfloat16 rows if the rotation has one block with an inner factor of 128
    (and, on GPU, an outer one that fits the chip's shared memory), else ``xla``."""
    fits = rotation.blocks == 1 and rotation.inner == LANES and dtype == jnp.bfloat16
    if not fits or rows < FEWEST_ROWS:
        return "xla"
    if platform() == "gpu":
        return "pallas_gpu" if rotation.outer <= WIDEST_OUTER and suits_device() else "xla"
    return "pallas_tpu" if platform() == "tpu" else "xla"


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _kernel(x: jax.Array, rotation: Rotation, scale: jax.Array | None = None) -> jax.Array:
    # Not needed, and slow to import, elsewhere.
    if platform() == "gpu":
        from mquant_jax.ops import rotate_gpu as kernels
    else:
        from mquant_jax.ops import pallas_tpu as kernels

    x = rotation.signed(x)
    x = rotation.padded(x) if rotation.inputs % LANES else x  # whole tiles the kernel pads itself
    flat = kernels.rotate(x.reshape(-1, x.shape[-1]), rotation.outer, scale)
    return flat.reshape(*x.shape[:-1], rotation.n)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """float ``[..., inputs]`` -> ``[..., n]`` in the same type."""
    if select_path(rotation, _rows(x), x.dtype) == "xla":
        return rotation(x)
    return _kernel(x, rotation)


def rotate_quantize(x: jax.Array, rotation: Rotation, scale: jax.Array) -> QTensor:
    """:func:`rotate`, then int8 with a known scale.

    Args:
        x: float ``[..., inputs]``.
        scale: float32, one number or ``[..., 1]``, per row.
    """
    if select_path(rotation, _rows(x), x.dtype) == "xla":
        return quantize_static(rotation(x), scale)
    rows = jnp.broadcast_to(scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    return QTensor(_kernel(x, rotation, rows), scale)
