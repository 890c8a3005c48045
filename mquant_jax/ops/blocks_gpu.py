"""Masked loads and stores of the NVIDIA GPU kernels, whose blocks may cross an array's edge."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mquant_jax.shapes import Array, Bool, Num

LEAST = 16  # rows of a matrix unit's operand, and channels that it can sum over


def parts(d: int) -> list[tuple[int, int]]:
    """``d`` channels, a multiple of 16, as ``(start, size)`` of as few blocks as there are powers
    of two in it: 80 = 64 + 16."""
    out, start = [], 0
    while start < d:
        size = 1 << (d - start).bit_length() - 1
        out.append((start, size))
        start += size
    return out


def block_of(start: int, size: int) -> Any:
    """A slice whose start has the type of other indices, not that of a Python number."""
    return pl.ds(jnp.int32(start), size)


def within(start: Any, count: int, end: int) -> Bool[Array, " {count}"] | None:
    """Which of ``count`` indices from ``start``, a multiple of it, on are below ``end``; ``None``:
    all of them, in every block."""
    return None if end % count == 0 else start + jnp.arange(count, dtype=jnp.int32) < end


def sides(
    row: Bool[Array, " rows"] | None, column: Bool[Array, " columns"] | None, shape: tuple[int, int]
) -> Bool[Array, "{shape[0]} {shape[1]}"] | None:
    """Mask of a block from those of its sides; ``None``: all of it."""
    by_row = None if row is None else jnp.broadcast_to(row[:, None], shape)
    by_column = None if column is None else jnp.broadcast_to(column[None, :], shape)
    if by_row is None or by_column is None:
        return by_column if by_row is None else by_row
    return by_column & by_row


def load(ref: Any, mask: Bool[Array, "*block"] | None) -> Num[Array, "*block"]:
    """A block, zero where the mask says no."""
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Any, value: Num[Array, "*block"], mask: Bool[Array, "*block"] | None) -> None:
    """Write a block where the mask does not say no."""
    if mask is None:
        plgpu.store(ref, value)
    else:
        plgpu.store(ref, value, mask=mask)
