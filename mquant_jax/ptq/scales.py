"""Static activation scales from what calibration saw, and weight scales by clip search."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.numerics import INT_MAX, QWeight, grouped, quantize_weight, safe_scale
from mquant_jax.ptq.observe import Histogram

CLIP_NORM = 2.4  # the exponent that the GPTQ family uses: large errors weigh more than squared


def mse_clip(hist: Histogram, candidates: int = 60) -> float:
    """The clip in ``(0.1, 1] * amax`` whose int8 grid has the least squared rounding error."""
    keep = hist.counts > 0
    values, counts = hist.centres()[keep], hist.counts[keep]
    best, best_error = hist.amax, np.inf
    for ratio in np.linspace(1.0, 0.1, candidates):
        clip = hist.amax * ratio
        scale = clip / INT_MAX[8]
        error = values - np.minimum(np.round(values / scale), INT_MAX[8]) * scale
        total = float(counts @ error**2)
        if total < best_error:
            best, best_error = clip, total
    return best


def percentile_clip(hist: Histogram, share: float = 0.9999) -> float:
    """The magnitude that ``share`` of all values stay below."""
    below = np.cumsum(hist.counts) / hist.counts.sum()
    bin_ = int(np.searchsorted(below, share))
    return min(hist.amax, float(hist.centres()[min(bin_, hist.BINS - 1)]))


@jax.jit
def _output_errors(rows: jax.Array, gram: jax.Array, clips: jax.Array) -> jax.Array:
    """Error in the outputs of the layers that read a point for each clip: float32 ``[clips]``."""

    def error(clip):
        scale = clip / INT_MAX[8]
        e = rows - jnp.clip(jnp.round(rows / scale), -INT_MAX[8] - 1, INT_MAX[8]) * scale
        return jnp.sum((e @ gram) * e)

    return jax.lax.map(error, clips)


def output_clip(hist: Histogram, rows: np.ndarray, gram: jax.Array) -> float:
    """The clip in ``[0.2, 1] * amax`` with the least error in the outputs of the next layers.

    Args:
        rows: float ``[n, K]``, a sample of the inputs.
        gram: float32 ``[K, K]``, the sum of ``W^T W`` over the layers.
    """
    clips = hist.amax * np.linspace(1.0, 0.2, 17)
    errors = _output_errors(jnp.asarray(rows), gram, jnp.asarray(clips, jnp.float32))
    return float(clips[int(np.argmin(errors))])


def choose_clip(
    hist: Histogram, observer: str, rows: np.ndarray | None = None, gram: jax.Array | None = None
) -> float:
    """The largest magnitude that a static scale is to hold, by the recipe's observer."""
    if observer == "percentile":
        return percentile_clip(hist)
    if observer == "mse":
        return mse_clip(hist)
    if observer == "output" and rows is not None and gram is not None:
        return output_clip(hist, rows, gram)
    return hist.amax


def point_report(
    hists: list[Histogram], clips: list[float], names: tuple[str, ...]
) -> dict[str, Any]:
    """Per class: largest magnitude, root mean square, clip, share of clipped values, rounding error
    in relation.

    ``error`` is the root of ``sum (x - q)^2 / sum x^2``.
    """
    out: dict[str, Any] = {}
    for hist, clip, name in zip(hists, clips, names, strict=True):
        if hist.empty:
            continue
        values, total = hist.centres(), hist.counts.sum()
        scale = max(clip / INT_MAX[8], 1e-12)
        error = values - np.minimum(np.round(values / scale), INT_MAX[8]) * scale
        power = float(hist.counts @ values**2) + 1e-30
        out[name] = {
            **hist.range_report(),
            "clip": clip,
            "clipped": float(hist.counts[values > clip].sum() / total),
            "error": float((hist.counts @ error**2) / power) ** 0.5,
        }
    return out


@partial(jax.jit, static_argnames=("bits", "group_size"))
def clip_search(
    weight: jax.Array,
    bits: int,
    group_size: int | None = None,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Scale per channel (or group) with the least error ``sum_j importance_j |w_j - q_j|^p``.

    ``p`` is 2.4 without importance (the paper's clip), else 2. Shrink factors from 1 down to 0.4
    are tried in steps of 0.04, then those around the best in steps of 0.01. Eight bits have no
    need of it: their range is kept whole.

    Args:
        weight: float ``[out, in]``.
        importance: float32 ``[in]``, mean square of each input.

    Returns:
        float32 ``[out, groups]``.
    """
    blocks = grouped(weight.astype(jnp.float32), group_size)
    full = safe_scale(jnp.max(jnp.abs(blocks), axis=-1), bits)
    if bits == 8:
        return full
    qmax = INT_MAX[bits]
    factor = None if importance is None else importance.reshape(blocks.shape[1:])

    def attempt(best, shrink):
        best_error, best_shrink = best
        scale = (full * shrink)[..., None]
        e = jnp.abs(blocks - jnp.clip(jnp.round(blocks / scale), -qmax - 1, qmax) * scale)
        error = jnp.sum(e**CLIP_NORM if factor is None else factor * e**2, axis=-1)
        better = error < best_error
        shrink = jnp.where(better, shrink, best_shrink)
        return (jnp.where(better, error, best_error), shrink), None

    best = (jnp.full(full.shape, jnp.inf), jnp.ones_like(full))
    best, _ = jax.lax.scan(attempt, best, 1.0 - 0.04 * jnp.arange(16, dtype=jnp.float32))
    steps = jnp.asarray([-0.03, -0.02, -0.01, 0.01, 0.02, 0.03], jnp.float32)
    around = best[1][None] + steps[:, None, None]
    best, _ = jax.lax.scan(attempt, best, jnp.minimum(around, 1.0))
    return full * best[1]


def round_weight(weight: np.ndarray, bits: int, group_size: int | None, clip: bool) -> QWeight:
    """Round to nearest, with or without the clip search; packed when 4-bit."""
    w = jnp.asarray(weight, jnp.float32)
    scale = clip_search(w, bits, group_size) if clip else None
    q = quantize_weight(w, bits, group_size, scale)
    return jax.tree.map(np.asarray, q.packed())
