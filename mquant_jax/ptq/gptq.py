"""GPTQ: round a weight column by column, pushing each column's error onto those still to come.

Minimises ``||(W - Q) X||`` for the inputs ``X`` that calibration showed, through
``H = sum x x^T`` (Frantar et al. 2022, which the paper uses for all weights).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import INT_MAX, QWeight

DAMPING, DAMPING_GROWTH, DAMPING_LIMIT = 0.01, 10.0, 1e3
BLOCK = 128


@partial(jax.jit, donate_argnums=0)
def accumulate(hessian: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
    """``hessian + sum_t weight_t x_t x_t^T`` in float32.

    Args:
        hessian: float32 ``[K, K]``.
        x: float ``[..., K]``, inputs of the layer.
        weight: float32 ``[...]``, 0 for padding.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32) * jnp.sqrt(weight.reshape(-1, 1))
    return hessian + jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())))


def inverse_factor(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    Damping starts at 1 % of the mean diagonal and grows tenfold until the factor is finite: layers
    with fewer calibration tokens than inputs need it.

    Returns:
        ``U`` float32 ``[K, K]`` with ``U^T U = (H + lambda I)^-1``, and the relative damping used.
    """
    k = hessian.shape[0]
    mean = jnp.mean(jnp.diagonal(hessian))

    def attempt(damping):
        damped = hessian + (damping * mean) * jnp.eye(k)
        lower = jnp.linalg.cholesky(damped)
        half = jax.scipy.linalg.solve_triangular(lower, jnp.eye(k), lower=True)
        return jnp.linalg.cholesky(half.T @ half, upper=True)

    def bad(carry):
        damping, factor = carry
        return ~jnp.all(jnp.isfinite(factor)) & (damping < DAMPING_LIMIT)

    def retry(carry):
        damping = carry[0] * DAMPING_GROWTH
        return damping, attempt(damping)

    damping, factor = jax.lax.while_loop(bad, retry, (DAMPING, attempt(DAMPING)))
    return factor, damping


def _round_block(block, factor, scale, qmax):
    """Quantise ``block [out, B]`` with the square ``factor [B, B]`` of its own columns.

    Returns:
        int8 values ``[out, B]`` and errors over the diagonal ``[out, B]``.
    """
    out, width = block.shape
    columns = jnp.arange(width)

    def column(i, carry):
        values, errors = carry
        # The column as the errors of those before it have left it.
        w = block[:, i] - errors @ jnp.where(columns < i, factor[:, i], 0.0)
        q = jnp.clip(jnp.round(w / scale[:, i]), -qmax - 1, qmax)
        error = (w - q * scale[:, i]) / factor[i, i]
        return values.at[:, i].set(q.astype(jnp.int8)), errors.at[:, i].set(error)

    start = (jnp.zeros((out, width), jnp.int8), jnp.zeros((out, width), jnp.float32))
    return jax.lax.fori_loop(0, width, column, start)


@partial(jax.jit, static_argnames=("bits", "act_order"))
def gptq(
    weight: jax.Array, hessian: jax.Array, scale: jax.Array, bits: int, act_order: bool = True
) -> tuple[QWeight, jax.Array]:
    """Quantise one matrix.

    Args:
        weight: float ``[out, K]``.
        hessian: float32 ``[K, K]`` of its inputs.
        scale: float32 ``[out, groups]``, fixed beforehand (groups are those of the original column
            order, so act-order and groups go together).
        bits: 4 or 8.
        act_order: columns with the largest inputs first.

    Returns:
        The weight (``storage="int8"``) and the relative damping that was needed.
    """
    out, k = weight.shape
    dead = jnp.diagonal(hessian) <= 0
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    weight = jnp.where(dead, 0.0, weight.astype(jnp.float32))
    order = jnp.argsort(-jnp.diagonal(hessian)) if act_order else jnp.arange(k)
    factor, damping = inverse_factor(hessian[order][:, order])
    size = min(BLOCK, k)
    padded = -(-k // size) * size
    pad = padded - k
    w = jnp.pad(weight[:, order], ((0, 0), (0, pad)))
    u = jnp.pad(factor, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(padded) >= k) * 1.0)
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
    return QWeight(values, scale.astype(jnp.float32), k, bits, "int8"), damping
