"""GPTQ: round a weight column by column, pushing each column's error onto those still to come.

Minimises ``||(W - Q) X||`` for the inputs ``X`` that calibration showed, through
``H = sum x x^T`` (Frantar et al. 2022, which the paper uses for all weights).

``[K, K]`` arrays are what takes memory (1.4 GB each for the 18944 inputs of a 7B model's last MLP
layer). No more than three are alive: the Hessian, what the float model's inputs differ by (where
the recipe asks for it), and a copy of the Hessian that is factored and inverted in place by LAPACK.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import blas, lapack

from mquant_jax.numerics import INT_MAX, AnyArray, QWeight

DAMPING, DAMPING_GROWTH, MOST_GROWTHS = 0.01, 10.0, 5
BLOCK = 128
_ROWS = 256  # of a [K, K] array that are moved at a time


def empty_gram(k: int) -> Any:
    """Zeros ``[k, k]`` to :func:`accumulate` in: in host memory on CPU, else on the device."""
    zeros = np.zeros if jax.default_backend() == "cpu" else jnp.zeros
    return zeros((k, k), np.float32)


def accumulate(gram: Any, x: jax.Array, weight: jax.Array, y: jax.Array | None = None) -> Any:
    """``gram + sum_t weight_t y_t x_t^T`` in float32; ``y`` is ``x`` if not given.

    Args:
        gram: float32 ``[K, K]``, used up. Where it is a NumPy array, it is added to in place; and
            without ``y`` in its upper triangle alone, until :func:`prepare` completes it.
        x, y: float ``[..., K]``, inputs of the layer.
        weight: float32 ``[...]``, 0 for padding.
    """
    if not isinstance(gram, np.ndarray):
        return _accumulate(gram, x, weight, x if y is None else y)
    root = np.sqrt(np.asarray(weight, np.float32)).reshape(-1, 1)
    rows = np.asarray(x, np.float32).reshape(-1, len(gram)) * root
    # BLAS counts columns first: what it calls the lower triangle is our upper one.
    if y is None:
        blas.ssyrk(1.0, rows.T, 1.0, gram.T, lower=1, overwrite_c=1)
    else:
        others = np.asarray(y, np.float32).reshape(-1, len(gram)) * root
        blas.sgemm(1.0, rows.T, others.T, 1.0, gram.T, trans_b=1, overwrite_c=1)
    return gram


@partial(jax.jit, donate_argnums=0)
def _accumulate(gram, x, weight, y):
    root = jnp.sqrt(weight.reshape(-1, 1))
    x, y = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) * root for a in (x, y))
    highest = jax.lax.Precision.HIGHEST  # no bfloat16 or TF32 passes on accelerators
    return gram + jax.lax.dot_general(y, x, (((0,), (0,)), ((), ())), precision=highest)


def complete(gram: np.ndarray) -> None:
    """Copy the upper triangle to the lower one, in place."""
    k = len(gram)
    for i in range(0, k, _ROWS):
        square = gram[i : i + _ROWS, i : i + _ROWS]
        square[...] = np.triu(square) + np.triu(square, 1).T
        for j in range(i + _ROWS, k, _ROWS):
            gram[j : j + _ROWS, i : i + _ROWS] = gram[i : i + _ROWS, j : j + _ROWS].T


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What GPTQ needs to know of the inputs of a point, shared by all layers that read it.

    With columns in ``order``, the damped Hessian is ``R R^T`` of an upper ``R``, and GPTQ walks
    along the rows of ``U = R^-1``, ``U^T U`` being the inverse.

    Attributes:
        hessian: float32 ``[K, K]``; inputs that were always zero count as one.
        root: float32 ``[K, K]``, ``U`` with rows and columns from last to first, in the lower
            triangle; the rest is undefined.
        order: int32 ``[K]``, the order in which columns are rounded.
        cross: float32 ``[K, K]`` or ``None``, ``sum (x_float - x) x^T``.
        damping: relative damping that the factor needed.
    """

    hessian: np.ndarray
    root: np.ndarray
    order: np.ndarray
    cross: np.ndarray | None
    damping: float

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of ``U``, float32 ``[stop - start, K]``."""
        k = len(self.order)
        rows = np.array(self.root[k - stop : k - start][::-1, ::-1])
        rows[np.arange(k) < np.arange(start, stop)[:, None]] = 0.0
        return rows

    def target(self, weight: Any) -> np.ndarray:
        """The weight that acts on the quantised model's inputs as nearly as can be as ``weight``
        does on the float model's: the least-squares ``W (H + C) H^-1 = W + W C H^-1``."""
        if self.cross is None:
            return np.asarray(weight, np.float32)
        weight = np.asarray(weight, np.float32)
        moved = np.asfortranarray((weight @ self.cross)[:, self.order[::-1]])
        for trans in (1, 0):
            moved = blas.strmm(1.0, self.root, moved, side=1, lower=1, trans_a=trans, overwrite_b=1)
        out = np.array(weight)
        out[:, self.order[::-1]] += moved
        return out


def prepare(
    hessian: Any, cross: Any = None, act_order: bool = True, left_out: int | None = None
) -> Inputs:
    """Factor a Hessian.

    Damping starts at 1 % of the mean diagonal and grows tenfold until there is a factor: layers
    with fewer calibration tokens than inputs need it.

    Args:
        hessian: float32 ``[K, K]``, ``sum x x^T`` over the quantised model's inputs ``x``, from
            :func:`accumulate`. It is completed in place.
        cross: float32 ``[K, K]``, ``sum (x_float - x) x^T``, or ``None``.
        act_order: columns with the largest inputs first.
        left_out: a column that is taken for always zero: nothing is pushed onto it.
    """
    hessian = hessian if isinstance(hessian, np.ndarray) else np.array(hessian, np.float32)
    complete(hessian)
    diagonal = np.einsum("ii->i", hessian)
    diagonal[diagonal <= 0] = 1.0
    sizes = np.array(diagonal)
    if left_out is not None:
        sizes[left_out] = 1.0
    k = len(sizes)
    order = np.argsort(-sizes, kind="stable") if act_order else np.arange(k)
    root = np.empty((k, k), np.float32, order="F")
    for growth in range(MOST_GROWTHS + 1):
        damping = DAMPING * DAMPING_GROWTH**growth
        _gather(hessian, order[::-1], left_out, damping * float(sizes.mean()), root)
        if _inverted(root):
            break
    else:
        raise FloatingPointError("their products have no Cholesky factor")
    cross = None if cross is None else np.asarray(cross)
    return Inputs(hessian, root, order.astype(np.int32), cross, damping)


def _gather(
    hessian: np.ndarray, order: np.ndarray, left_out: int | None, damping: float, out: np.ndarray
) -> None:
    """The damped Hessian with rows and columns in ``order``, into ``out``."""
    columns = out.T  # contiguous; the matrix is symmetric
    for start in range(0, len(order), _ROWS):
        columns[start : start + _ROWS] = hessian[order[start : start + _ROWS]][:, order]
    if left_out is not None:
        at = int(np.flatnonzero(order == left_out)[0])
        out[at, :] = out[:, at] = 0.0
        out[at, at] = 1.0
    np.einsum("ii->i", out)[:] += damping


def _inverted(root: np.ndarray) -> bool:
    """``root`` becomes the inverse of its own lower Cholesky factor; whether there is one."""
    for step, options in ((lapack.spotrf, {"overwrite_a": 1, "clean": 0}),
                          (lapack.strtri, {"overwrite_c": 1})):  # fmt: skip
        result, info = step(root, lower=1, **options)
        if info != 0:
            return False
        if result is not root and not np.shares_memory(result, root):
            root[...] = result
    return bool(np.isfinite(np.einsum("ii->i", root)).all())


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


@partial(jax.jit, static_argnames=("bits",), donate_argnums=0)
def _step(w: jax.Array, start, rows: jax.Array, scale: jax.Array, bits: int):
    """Round the columns from ``start`` on; as many as ``rows [B, K]`` of ``U`` there are.

    Returns:
        The weight with errors pushed onto later columns, and int8 values ``[out, B]``.
    """
    width = len(rows)
    block = jax.lax.dynamic_slice_in_dim(w, start, width, axis=1)
    square = jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)
    values, errors = _round_block(block, square, scale, INT_MAX[bits])
    later = jnp.where(jnp.arange(w.shape[1]) >= start + width, rows, 0.0)
    return w - errors @ later, values


def gptq(weight: Any, inputs: Inputs, scale: jax.Array, bits: int) -> QWeight:
    """Quantise one matrix.

    Args:
        weight: float ``[out, K]``.
        inputs: from :func:`prepare`.
        scale: float32 ``[out, groups]``, fixed beforehand (groups are those of the original column
            order, so act-order and groups go together).
        bits: 4 or 8.

    Returns:
        The weight (``storage="int8"``), NumPy arrays.
    """
    scales: Any = np.asarray(scale, np.float32)
    k, order = len(inputs.order), inputs.order
    w = jnp.asarray(np.asarray(weight, np.float32)[:, order])
    group = order // (k // scales.shape[1])
    values: Any = np.empty(w.shape, np.int8)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        own = jnp.asarray(scales[:, group[start:stop]])
        w, q = _step(w, start, jnp.asarray(inputs.rows(start, stop)), own, bits)
        values[:, order[start:stop]] = q
    return QWeight(values, scales, k, bits, "int8")


def output_error(weight: jax.Array, q: Any, hessian: AnyArray) -> jax.Array:
    """``sum_t |(w - q) x_t|^2`` of every output channel, float32 ``[out]``.

    ``q``: anything with ``dequantize()``.
    """
    return _output_error(weight, q.dequantize(), hessian)


def relative_output_error(weight: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    """Root of ``sum_t |(w - q) x_t|^2 / sum_t |w x_t|^2`` over up to 256 output channels, which are
    spread evenly: all of them would take as long as rounding.

    Args:
        weight, rounded: float32 ``[out, K]``.
        hessian: float32 ``[K, K]``; in host memory, and not copied.
    """
    some = slice(None, None, -(-len(weight) // _ROWS))
    weight, error = weight[some], weight[some] - rounded[some]
    lost = np.sum((error @ hessian) * error, dtype=np.float64)
    whole = np.sum((weight @ hessian) * weight, dtype=np.float64)
    return float(np.sqrt(max(lost, 0.0) / (whole + 1e-30)))


@jax.jit
def _output_error(weight: jax.Array, rounded: jax.Array, hessian: Any) -> jax.Array:
    error = weight.astype(jnp.float32) - rounded
    return jnp.sum((error @ hessian) * error, axis=1)


@jax.jit
def refit(weight: jax.Array, q: QWeight, hessian: Any) -> jax.Array:
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

    ``weight`` is the target already (:meth:`Inputs.target`).
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
        kept: dict[str, Any] = {
            name: np.where(better, getattr(q, name), getattr(best, name))
            for name in ("values", "scale")
        }
        best = dataclasses.replace(best, **kept)
        least = jnp.minimum(error, least)
    return best
