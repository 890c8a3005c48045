"""Loops of kernels, which have no 64-bit integers whatever ``jax_enable_x64`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


def int32_loop(first: Any, last: Any, body: Callable, start: Any, **options: Any) -> Any:
    """``jax.lax.fori_loop`` that counts in int32; bounds may be Python numbers or traced."""
    first, last = (np.int32(n) if isinstance(n, int) else n for n in (first, last))
    return jax.lax.fori_loop(first, last, body, start, **options)


def blocks_of(count: Any, size: int) -> Any:
    """How many blocks of ``size`` hold ``count`` things, an int32 of a kernel."""
    whole: Any = np.int32(size)
    return pl.cdiv(count, whole)


def repeat(times: int, body: Callable[[jax.Array], None], first: int = 0, **options: Any) -> None:
    """``body(i)`` for ``i`` from ``first`` to ``times``, for its effects."""

    def step(i, nothing):
        body(i)
        return nothing

    int32_loop(first, times, step, jnp.int32(0), **options)
