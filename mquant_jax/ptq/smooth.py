"""SmoothQuant (Xiao et al. 2023): move activation outliers into the weights, channel by channel.

``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``; activations are divided by ``s``, weights
multiplied. The strength ``alpha`` is searched separately for every norm, value and hidden layer, by
the quantisation error in the outputs of the layers that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.lazy import lazy
from mquant_jax.models.streams import Streams
from mquant_jax.numerics import (
    INT_MAX,
    along_last,
    quantize_dynamic,
    quantize_static,
    quantize_weight,
)
from mquant_jax.ptq.channels import Link, links, scale
from mquant_jax.ptq.rotate import Params
from mquant_jax.ptq.statistics import Statistics
from mquant_jax.recipe import Recipe, Section

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@partial(jax.jit, static_argnames=("section",))
def _error(x, amax, weight, s, section: Section):
    """Return the squared error of ``x @ weight.T`` with both scaled by ``s [K]`` and quantised."""
    scaled, w = x / along_last(s, x), weight * along_last(s, weight)
    if section.activations == "static":
        scaled = quantize_static(scaled, jnp.max(amax / s) / INT_MAX[8]).dequantize()
    elif section.activations == "dynamic":
        scaled = quantize_dynamic(scaled).dequantize()
    if section.quantised:
        w = quantize_weight(w, section.w_bits, section.group_size).dequantize()
    return jnp.sum((scaled @ w.T - x @ weight.T) ** 2)


def smooth_params(
    params: Mapping[str, Any], streams: Streams, recipe: Recipe, stats: Statistics
) -> tuple[Params, dict[str, float]]:
    """Smooth every link whose readers have quantised inputs.

    Args:
        params: float tensors by name, layers separate. Not modified.
        stats: statistics of the float model at its points.

    Returns:
        New tensors, float32 where they changed, and the strength chosen for each (first)
        reader; 0 means none.
    """
    out = lazy(params)
    chosen: dict[str, float] = {}
    for link in links(params, streams):
        sections = [recipe.section_for(reader) for reader in link.readers]
        unseen = link.readers[0] not in stats.point_of
        if unseen or all(s.activations == "none" for s in sections):
            continue
        alpha, gains = _search(out, link, stats, sections)
        chosen[link.readers[0]] = alpha
        scale(out, link, 1.0 / gains)
    return out, chosen


def _search(params: Params, link: Link, stats: Statistics, sections: Sequence[Section]):
    """Return the strength with the least error, and its scales, float64 ``[width]``.

    Readers may read several points: experts have one each.
    """
    weights = [jnp.asarray(params[f"{r}/kernel"].load(), jnp.float32) for r in link.readers]
    points = [stats.point_of[r] for r in link.readers]
    seen = {p: (jnp.asarray(stats.samples[p].rows), jnp.asarray(stats.channels[p])) for p in points}
    x_amax, w_amax = np.zeros(link.width), np.zeros(link.width)
    for _, columns in seen.values():
        np.maximum.at(x_amax, link.columns, np.asarray(columns))
    for w in weights:
        np.maximum.at(w_amax, link.columns, np.abs(np.asarray(w)).max(0))
    best = 0.0, np.ones(link.width)
    least = np.inf
    for alpha in (0.0, *ALPHAS):
        gains = np.ones(link.width)
        if alpha:
            gains = np.maximum(x_amax, 1e-5) ** alpha / np.maximum(w_amax, 1e-5) ** (1 - alpha)
            gains = np.clip(gains / np.exp(np.log(gains).mean()), 1e-4, 1e4)
        s = jnp.asarray(gains[link.columns], jnp.float32)
        error = sum(
            float(_error(*seen[p], w, s, section))
            for p, w, section in zip(points, weights, sections, strict=True)
        )
        if error < least:
            least, best = error, (alpha, gains)
    return best
