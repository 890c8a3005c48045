"""Online rotations and the quantisation behind them: which form runs is chosen here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.hadamard import LANES, Rotation
from mquant_jax.numerics import QTensor, quantize_static
from mquant_jax.ops.dense import early_tpu, platform

FEWEST_ROWS = 64  # below, the kernel's fixed cost is not worth it


def select_path(rotation: Rotation, rows: int, dtype) -> str:
    """Name of the form that :func:`rotate` and :func:`rotate_quantize` run: ``pallas_tpu`` for
    many bfloat16 rows on TPU if the rotation has one block and fills the lanes, else ``xla``."""
    fits = rotation.blocks == 1 and rotation.inner == LANES and dtype == jnp.bfloat16
    kernels = platform() == "tpu" and not early_tpu()
    return "pallas_tpu" if kernels and fits and rows >= FEWEST_ROWS else "xla"


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _kernel(x: jax.Array, rotation: Rotation, scale: jax.Array | None = None) -> jax.Array:
    from mquant_jax.ops import pallas_tpu  # not needed, and slow to import, where there is no TPU

    x = rotation.signed(x)
    x = rotation.padded(x) if rotation.inputs % LANES else x  # whole tiles the kernel pads itself
    flat = pallas_tpu.rotate(x.reshape(-1, x.shape[-1]), rotation.outer, scale)
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
