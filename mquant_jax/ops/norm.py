"""RMS norms and the quantisation that may follow them. The forms, best first: :data:`NORM`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, Scale, along_last, quantize_static
from mquant_jax.ops.registry import Form, Op, unless
from mquant_jax.shapes import Array, Float, Float32
from mquant_jax.target import Target, target


@dataclasses.dataclass(frozen=True)
class Normed:
    """A norm of ``rows`` rows that are quantised."""

    rows: int
    features: int
    dtype: Any


def mean_square(x: Float32[Array, "*batch features"]) -> Float32[Array, "*batch 1"]:
    """Of each row."""
    return of_rows(lambda x: jnp.mean(x * x, axis=-1, keepdims=True), x)


def of_rows(
    sums: Callable[[jax.Array], jax.Array], x: Float32[Array, "*batch features"]
) -> Float32[Array, "*batch 1"]:
    """``sums`` of each row, with one order of addition for any number of rows: XLA's CPU backend
    adds up few values in another order than many, so rows of zeros make them many."""
    rows, least = x.size // x.shape[-1], -(-target().limits.summed // x.shape[-1])
    if target().platform != "cpu" or rows >= least:
        return sums(x)
    flat = jnp.pad(x.reshape(rows, x.shape[-1]), ((0, least - rows), (0, 0)))
    return sums(flat)[:rows].reshape(*x.shape[:-1], 1)


def rms_norm(
    x: Float[Array, "*batch features"], weight: Float[Array, " features"], eps: float, dtype: Any
) -> Float[Array, "*batch features"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32, then ``dtype``."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(mean_square(x) + eps)
    return (x * along_last(weight, x)).astype(dtype)


def _by_xla(x, weight, eps: float, scale, dtype) -> QTensor:
    return quantize_static(rms_norm(x, weight, eps, dtype), scale)


def _by_kernel(x, weight, eps: float, scale, dtype) -> QTensor:
    from mquant_jax.ops import pallas_tpu_norm  # slow to import where there is no TPU

    per_row = scale if scale.ndim == 0 else scale.reshape(-1, 1)
    flat, to = x.reshape(-1, x.shape[-1]), target()
    y = pallas_tpu_norm.rms_quantize(flat, weight, eps, per_row, interpret=to.interpret)
    return QTensor(y.reshape(x.shape), scale)


def _no_kernel(n: Normed, to: Target) -> str | None:
    least = to.limits.norm_rows
    return unless(
        (to.platform == "tpu" and not to.early_tpu, "not a TPU from v5 on"),
        (n.dtype == jnp.bfloat16, f"{n.dtype}, not bfloat16"),
        (n.rows >= least, f"{n.rows} rows; the least is {least}"),
    )


NORM: Op[Normed] = Op("norm", Form("pallas_tpu", _by_kernel, _no_kernel), Form("xla", _by_xla))


def rms_quantize(
    x: Float[Array, "*batch features"],
    weight: Float[Array, " features"],
    eps: float,
    scale: Scale,
    dtype: Any,
) -> QTensor:
    """:func:`rms_norm`, then int8 by ``scale``.

    Args:
        dtype: that the normed values are rounded to first, where no kernel joins the steps.
    """
    spec = Normed(x.size // x.shape[-1], x.shape[-1], x.dtype)
    return NORM.pick(spec)(x, weight, eps, scale, dtype)
