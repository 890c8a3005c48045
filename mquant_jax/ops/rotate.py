"""Online rotations and the quantisation behind them: which form runs is chosen here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mquant_jax.hadamard import LANES, Rotation
from mquant_jax.numerics import QTensor, quantize_static
from mquant_jax.ops.dense import platform

FEWEST_ROWS = 64  # below, the kernel's fixed cost is not worth it


def select_path(rotation: Rotation, rows: int, dtype) -> str:
    """Name of the form that :func:`rotate` and :func:`rotate_quantize` run: ``pallas_tpu`` for
    many bfloat16 rows on TPU if the rotation has one block and fills the lanes, else ``xla``."""
    fits = rotation.blocks == 1 and rotation.inner == LANES and dtype == jnp.bfloat16
    return "pallas_tpu" if platform() == "tpu" and fits and rows >= FEWEST_ROWS else "xla"


def _rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _kernel(*args: jax.Array | int) -> jax.Array:
    from mquant_jax.ops import pallas_tpu  # not needed, and slow to import, where there is no TPU

    return pallas_tpu.rotate(*args)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """float ``[..., inputs]`` -> ``[..., n]`` in the same type."""
    if select_path(rotation, _rows(x), x.dtype) == "xla":
        return rotation(x)
    x = rotation.signed(x)
    flat = _kernel(x.reshape(-1, rotation.n), rotation.outer)
    return flat.reshape(x.shape)


def rotate_quantize(x: jax.Array, rotation: Rotation, scale: jax.Array) -> QTensor:
    """:func:`rotate`, then int8 with a known scale.

    Args:
        x: float ``[..., inputs]``.
        scale: float32, one number or ``[..., 1]``, per row.
    """
    if select_path(rotation, _rows(x), x.dtype) == "xla":
        return quantize_static(rotation(x), scale)
    x = rotation.signed(x)
    rows = jnp.broadcast_to(scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    flat = _kernel(x.reshape(-1, rotation.n), rotation.outer, rows)
    return QTensor(flat.reshape(x.shape), scale)
