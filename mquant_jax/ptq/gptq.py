"""GPTQ: round a weight column by column, pushing each column's error onto those still to come.

Minimises ``||(W - Q) X||`` for the inputs ``X`` that calibration showed, through
``H = sum x x^T`` (Frantar et al. 2022, which the paper uses for all weights).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import INT_MAX, QWeight

DAMPING, DAMPING_GROWTH, MOST_GROWTHS = 0.01, 10.0, 5
BLOCK = 128


@partial(jax.jit, donate_argnums=0)
def accumulate(
    hessian: jax.Array, x: jax.Array, weight: jax.Array, y: jax.Array | None = None
) -> jax.Array:
    """``hessian + sum_t weight_t y_t x_t^T`` in float32; ``y`` is ``x`` if not given.

    Args:
        hessian: float32 ``[K, K]``.
        x, y: float ``[..., K]``, inputs of the layer.
        weight: float32 ``[...]``, 0 for padding.
    """
    root = jnp.sqrt(weight.reshape(-1, 1))
    x, y = (
        a.reshape(-1, a.shape[-1]).astype(jnp.float32) * root for a in (x, x if y is None else y)
    )
    return hessian + jax.lax.dot_general(y, x, (((0,), (0,)), ((), ())))


def inverse_factor(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Damping starts at 1 % of the mean diagonal and grows tenfold until the factor is finite: layers
    with fewer calibration tokens than inputs need it.

    Returns:
        ``U`` float32 ``[K, K]`` with ``U^T U = (H + lambda I)^-1``, and the relative damping used.
    """
    k = hessian.shape[0]
    mean, one = jnp.mean(jnp.diagonal(hessian)), jnp.eye(k, dtype=jnp.float32)

    def attempt(carry):
        growths, _ = carry
        damping = DAMPING * DAMPING_GROWTH**growths
        damped = hessian + (damping * mean) * one
        # With rows and columns from last to first, H = R R^T of an upper R, and so U = R^-1.
        root = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return growths + 1, jax.scipy.linalg.solve_triangular(root, one)

    def bad(carry):
        growths, factor = carry
        return ~jnp.all(jnp.isfinite(factor)) & (growths <= MOST_GROWTHS)

    # The first attempt is the loop's as well: compiling it is what takes long.
    growths, factor = jax.lax.while_loop(bad, attempt, (jnp.float32(0), one * jnp.nan))
    return factor, DAMPING * DAMPING_GROWTH ** (growths - 1)


def _round_block(block, factor, scale, qmax):
    """Quantise ``block [out, B]`` with the square ``factor [B, B]`` of its own columns.

    Returns:
        int8 values ``[out, B]`` and errors over the diagonal ``[out, B]``.
    """
    out, width = block.shape
    columns = jnp.arange(width, dtype=jnp.int32)

    def column(i, carry):
        values, errors = carry
        # The column as the errors of those before it have left it.
        w = block[:, i] - errors @ jnp.where(columns < i, factor[:, i], 0.0)
        q = jnp.clip(jnp.round(w / scale[:, i]), -qmax - 1, qmax)
        error = (w - q * scale[:, i]) / factor[i, i]
        return values.at[:, i].set(q.astype(jnp.int8)), errors.at[:, i].set(error)

    start = (jnp.zeros((out, width), jnp.int8), jnp.zeros((out, width), jnp.float32))
    return jax.lax.fori_loop(0, width, column, start)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hessian", "factor", "order", "shift", "damping"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What GPTQ needs to know of the inputs of a point, shared by all layers that read it.

    Attributes:
        hessian: float32 ``[K, K]``; inputs that were always zero count as one.
        factor: upper Cholesky factor of the damped inverse, columns in ``order``.
        order: int32 ``[K]``, the order in which columns are rounded.
        shift: float32 ``[K, K]`` or ``None``; ``W + W shift`` acts on the quantised model's inputs
            as nearly as can be as ``W`` on the float model's.
        damping: relative damping that the factor needed.
    """

    hessian: jax.Array
    factor: jax.Array
    order: jax.Array
    shift: jax.Array | None
    damping: jax.Array


@partial(jax.jit, static_argnames=("act_order",))
def prepare(hessian: jax.Array, cross: jax.Array | None = None, act_order: bool = True) -> Inputs:
    """Factor a Hessian.

    Args:
        hessian: float32 ``[K, K]``, ``sum x x^T`` over the quantised model's inputs ``x``.
        cross: float32 ``[K, K]``, ``sum (x_float - x) x^T``, or ``None``.
        act_order: columns with the largest inputs first.
    """
    k, hessian = hessian.shape[0], hessian.astype(jnp.float32)
    dead = jnp.diagonal(hessian) <= 0
    hessian = hessian + jnp.diag(dead.astype(jnp.float32))
    order = jnp.argsort(-jnp.diagonal(hessian)) if act_order else jnp.arange(k)
    cross = None if cross is None else cross.astype(jnp.float32)
    factor, damping = inverse_factor(hessian[order][:, order])
    shift = None
    if cross is not None:
        # The least-squares weight for the quantised inputs is W (H + C) H^-1 = W + W C H^-1.
        by_order = cross[:, order] @ factor.T @ factor
        shift = jnp.zeros_like(cross).at[:, order].set(by_order)
    return Inputs(hessian, factor, order, shift, damping)


@partial(jax.jit, static_argnames=("bits",))
def gptq(weight: jax.Array, inputs: Inputs, scale: jax.Array, bits: int) -> QWeight:
    """Quantise one matrix.

    Args:
        weight: float ``[out, K]``.
        inputs: from :func:`prepare`.
        scale: float32 ``[out, groups]``, fixed beforehand (groups are those of the original column
            order, so act-order and groups go together).
        bits: 4 or 8.

    Returns:
        The weight (``storage="int8"``).
    """
    out, k = weight.shape
    order = inputs.order
    size = min(BLOCK, k)
    padded = -(-k // size) * size
    pad = padded - k
    w = jnp.pad(weight.astype(jnp.float32)[:, order], ((0, 0), (0, pad)))
    beyond = (jnp.arange(padded) >= k).astype(jnp.float32)
    u = jnp.pad(inputs.factor, ((0, pad), (0, pad))) + jnp.diag(beyond)
    group = order // (k // scale.shape[1])
    s = jnp.pad(scale[:, group], ((0, 0), (0, pad)), constant_values=1.0)

    def body(b, carry):
        w, values = carry
        at = b * size
        block = jax.lax.dynamic_slice(w, (0, at), (out, size))
        square = jax.lax.dynamic_slice(u, (at, at), (size, size))
        own = jax.lax.dynamic_slice(s, (0, at), (out, size))
        q, errors = _round_block(block, square, own, INT_MAX[bits])
        rows = jax.lax.dynamic_slice(u, (at, 0), (size, padded))
        later = jnp.where(jnp.arange(padded) >= at + size, rows, 0.0)
        return w - errors @ later, jax.lax.dynamic_update_slice(values, q, (0, at))

    start = (w, jnp.zeros((out, padded), jnp.int8))
    _, values = jax.lax.fori_loop(0, padded // size, body, start)
    values = jnp.zeros((out, k), jnp.int8).at[:, order].set(values[:, :k])
    return QWeight(values, scale.astype(jnp.float32), k, bits, "int8")


def output_error(weight: jax.Array, q: Any, hessian: jax.Array) -> jax.Array:
    """``sum_t |(w - q) x_t|^2`` of every output channel, float32 ``[out]``.

    ``q``: anything with ``dequantize()``.
    """
    return _output_error(weight, q.dequantize(), hessian)


@jax.jit
def _output_error(weight: jax.Array, rounded: jax.Array, hessian: jax.Array) -> jax.Array:
    error = weight.astype(jnp.float32) - rounded
    return jnp.sum((error @ hessian) * error, axis=1)


@jax.jit
def refit(weight: jax.Array, q: QWeight, hessian: jax.Array) -> jax.Array:
    """The scales that serve the rounded integers best, by the layer's output error.

    One sweep of coordinate descent over the groups, each in closed form; exact when there is one.

    Returns:
        float32 ``[out, groups]``, positive.
    """
    out, k = q.values.shape
    size = k // q.groups
    blocks = q.values.reshape(out, q.groups, size).astype(jnp.float32)
    residual = (weight.astype(jnp.float32) - q.dequantize()) @ hessian

    def step(residual, g):
        rows = jax.lax.dynamic_slice(hessian, (g * size, 0), (size, k))
        own = jax.lax.dynamic_slice(rows, (0, g * size), (size, size))
        part = jax.lax.dynamic_index_in_dim(blocks, g, axis=1, keepdims=False)
        seen = jax.lax.dynamic_slice(residual, (0, g * size), (out, size))
        bottom = jnp.sum((part @ own) * part, axis=1)
        change = jnp.where(bottom > 0, jnp.sum(seen * part, axis=1) / bottom, 0.0)
        # A sign must not flip and a scale must not vanish.
        change = jnp.maximum(change, -0.5 * q.scale[:, g])
        return residual - change[:, None] * (part @ rows), change

    _, changes = jax.lax.scan(step, residual, jnp.arange(q.groups))
    return q.scale + changes.T


def fitted(weight: jax.Array, inputs: Inputs, scale: jax.Array, bits: int, rounds: int) -> QWeight:
    """:func:`gptq`, then ``rounds`` times :func:`refit` and rounding anew; each channel keeps its
    best.

    ``weight`` is the target: shifted already, where inputs have a shift.
    """
    best = gptq(weight, inputs, scale, bits)
    if not rounds:
        return best
    least = output_error(weight, best, inputs.hessian)
    for i in range(rounds + 1):
        scale = refit(weight, best, inputs.hessian)
        # The last round keeps the integers: scales that fit them can only help.
        last = i == rounds
        q = dataclasses.replace(best, scale=scale) if last else gptq(weight, inputs, scale, bits)
        error = output_error(weight, q, inputs.hessian)
        better = (error < least)[:, None]
        best = dataclasses.replace(
            best,
            values=jnp.where(better, q.values, best.values),
            scale=jnp.where(better, q.scale, best.scale),
        )
        least = jnp.minimum(error, least)
    return best
