"""Even out channel magnitudes before the rotation, without changing the model's function.

A rotation spreads large channels over all others, and their quantisation error with them. Some
channel scales are free: those between values and the output projection, and those between the
linear half of a gated MLP and its last layer. Only the product with the reader's columns matters
there, so the scales are chosen for the smallest error. Rotated activations ``x`` of ``[K]``
channels and weights ``W [out, K]`` get errors of equal size in all channels; their squared error in
the output is proportional to ``|x|^2 |W|^2``. Scaling channels by ``s`` makes that ``(sum_j s_j^2
a_j^2) (sum_j w_j^2 / s_j^2)``, where ``a`` is the channels' root mean square and ``w`` the columns'
norms. By Cauchy-Schwarz the minimum is ``(sum_j a_j w_j)^2``, at ``s_j^2 = w_j / a_j``. Where there
are biases, the means of values are removed first: attention passes constants on unchanged.

Only very uneven channels are balanced. GPTQ makes up for much of what the others would gain: on
SmolLM2, where 0.6 to 0.9 of the error would be left in most layers, balancing all of them gained
nothing. Sinks are left out of the statistics. They have separate scales, and balancing their
massive channels costs all other tokens (1.11 instead of 1.09 times float's perplexity).

Norms do not need balancing: their weights and biases move into their readers in the rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mquant_jax.lazy import lazy
from mquant_jax.models.streams import Streams
from mquant_jax.ptq.channels import Link, can_shift, links, scale, shift
from mquant_jax.ptq.rotate import Params
from mquant_jax.ptq.statistics import Statistics

# Least size of a channel relative to the root mean square over channels: calibration may not have
# excited it.
_LEAST = 0.01
_WORTH = 0.15  # balance if at most this share of the error is left


def balance_params(
    params: Mapping[str, Any], streams: Streams, stats: Statistics
) -> tuple[Params, dict[str, float]]:
    """Choose the scales and means of all channels that the declared streams leave free.

    Args:
        params: float tensors by name, layers separate, not rotated. Not modified.
        stats: statistics of the float model at its points, with columns.

    Returns:
        New tensors, float32 where they changed, and the share of ``|x|^2 |W|^2`` left at each
        (first) reader.
    """
    out = lazy(params)
    left: dict[str, float] = {}
    for link in links(params, streams):
        if link.is_norm or any(reader not in stats.point_of for reader in link.readers):
            continue
        squares, means, shares = _channels(link, stats)
        if can_shift(out, link):
            shift(out, link, -means)
            squares = np.maximum(squares - shares * means**2, 0.0)
        columns = np.zeros(link.width)
        for reader in link.readers:
            np.add.at(columns, link.columns, stats.weights[reader])
        gains = np.sqrt(_sizes(columns) / _sizes(squares))
        gains /= np.exp(np.log(gains).mean())
        before = squares.sum() * columns.sum()
        after = (squares * gains**2).sum() * (columns / gains**2).sum()
        if after < _WORTH * before:
            scale(out, link, gains)
            left[link.readers[0]] = float(after / before)
    return out, left


def _sizes(squares: np.ndarray) -> np.ndarray:
    size = np.sqrt(squares)
    return np.maximum(size, _LEAST * np.sqrt(squares.mean()) + 1e-30)


def _channels(link: Link, stats: Statistics) -> tuple[np.ndarray, ...]:
    """Return each channel's mean square (summed over the columns that share it), its mean, and the
    number of columns that share it; float64 ``[width]``."""
    squares, means, shares = (np.zeros(link.width) for _ in range(3))
    for point in {stats.point_of[reader]: None for reader in link.readers}:
        mean, square = stats.moments[point]
        np.add.at(squares, link.columns, square)
        np.add.at(means, link.columns, mean)
        np.add.at(shares, link.columns, 1)
    return squares, means / shares, shares
