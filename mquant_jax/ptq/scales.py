"""Static activation scales from what calibration saw, and weight scales by clip search."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.errors import UserError
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


def activation_scale(hists: list[Histogram], observer: str, point: str) -> np.ndarray:
    """``act_scale[n_classes]`` of one point.

    Raises:
        UserError: calibration showed no token of some class.
    """
    scales = []
    for c, hist in enumerate(hists):
        if hist.empty:
            kind = ("text", "visual")[c]
            raise UserError(
                f"calibration data holds no {kind} tokens (seen at {point}); "
                "static scales need prompts with pictures and text"
            )
        clip = hist.amax if observer == "minmax" else mse_clip(hist)
        scales.append(max(clip / INT_MAX[8], 1e-12))
    return np.asarray(scales, np.float32)


def point_report(hists: list[Histogram], scale: np.ndarray) -> dict[str, Any]:
    """Largest magnitude, clip and share of clipped values, one entry per class."""
    clip = scale * INT_MAX[8]
    over = [float(h.counts[h.centres() > c].sum() / h.counts.sum())
            for h, c in zip(hists, clip, strict=True)]  # fmt: skip
    return {"amax": [h.amax for h in hists], "clip": clip.tolist(), "clipped": over}


@partial(jax.jit, static_argnames=("bits", "group_size", "steps"))
def clip_search(
    weight: jax.Array, bits: int, group_size: int | None = None, steps: int = 80
) -> jax.Array:
    """Scale per channel (or group) with the least ``sum |w - q|^2.4`` (paper's MSE clip).

    Args:
        weight: float ``[out, in]``.
        steps: shrink factors 1.00, 0.99, ... tried.

    Returns:
        float32 ``[out, groups]``.
    """
    blocks = grouped(weight.astype(jnp.float32), group_size)
    full = safe_scale(jnp.max(jnp.abs(blocks), axis=-1), bits)
    qmax = INT_MAX[bits]

    def attempt(best, shrink):
        best_error, best_scale = best
        scale = full * shrink
        q = jnp.clip(jnp.round(blocks / scale[..., None]), -qmax - 1, qmax) * scale[..., None]
        error = jnp.sum(jnp.abs(blocks - q) ** CLIP_NORM, axis=-1)
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, scale, best_scale)), None

    start = (jnp.full(full.shape, jnp.inf), full)
    (_, scale), _ = jax.lax.scan(attempt, start, 1.0 - 0.01 * jnp.arange(steps))
    return scale


def round_weight(weight: np.ndarray, bits: int, group_size: int | None, clip: bool) -> QWeight:
    """Round to nearest, with or without the clip search; packed when 4-bit."""
    w = jnp.asarray(weight, jnp.float32)
    scale = clip_search(w, bits, group_size) if clip else None
    q = quantize_weight(w, bits, group_size, scale)
    return jax.tree.map(np.asarray, q.packed())
