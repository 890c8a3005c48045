"""Channels made even before they are rotated, where that leaves the model's function as it is.

A rotation spreads what large channels hold over all others, and with it their error. Of the sizes
of channels between values and the output projection, and between the linear half of a gated MLP and
its last layer, nothing but the product with the reader's columns matters; so they are chosen for
what comes behind. Rotated activations ``x`` of ``[K]`` channels and weights ``W [out, K]`` get an
error of one size each, whose square in the output is that of ``|x|^2 |W|^2``. Channels scaled by
``s`` make that ``(sum_j s_j^2 a_j^2) (sum_j w_j^2 / s_j^2)``, with ``a`` their root mean square and
``w`` the columns' norms, and by Cauchy and Schwarz least, ``(sum_j a_j w_j)^2``, at ``s_j^2 =
w_j / a_j``. Means are taken out of values first, where biases let them: attention keeps constants.

Only channels so uneven that little is left are touched. GPTQ makes up for much of what the rest
would gain: on SmolLM2, where 0.6 to 0.9 is left at most layers, balancing them all gained nothing.
Sinks do not count: they have scales of their own, and what evens out the channels in which they are
massive costs all other tokens (1.11 instead of 1.09 times float's perplexity).

Norms need none of this: their weights and biases move into their readers as they are rotated.
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

# Of the root mean square over channels, at least so much counts of each: calibration may not have
# shown what a channel can do.
_LEAST = 0.01
_WORTH = 0.15  # of what there was, at most so much may be left


def balance_params(
    params: Mapping[str, Any], streams: Streams, look: Statistics
) -> tuple[Params, dict[str, float]]:
    """Choose the sizes and means of all channels that the declared streams leave free.

    Args:
        params: float tensors by name, layers separate, not rotated. Left as they are.
        look: what the float model showed at its points, columns and all.

    Returns:
        New tensors, float32 where they changed, and what is left of ``|x|^2 |W|^2`` at each
        (first) reader.
    """
    out = lazy(params)
    left: dict[str, float] = {}
    for link in links(params, streams):
        if link.is_norm or any(reader not in look.point_of for reader in link.readers):
            continue
        squares, means, shares = _channels(link, look)
        if can_shift(out, link):
            shift(out, link, -means)
            squares = np.maximum(squares - shares * means**2, 0.0)
        columns = np.zeros(link.width)
        for reader in link.readers:
            np.add.at(columns, link.columns, look.weights[reader])
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


def _channels(link: Link, look: Statistics) -> tuple[np.ndarray, ...]:
    """Mean square (summed over the columns that share a channel) and mean of each channel, and how
    many columns share it; float64 ``[width]``."""
    squares, means, shares = (np.zeros(link.width) for _ in range(3))
    for point in {look.point_of[reader]: None for reader in link.readers}:
        mean, square = look.moments[point]
        np.add.at(squares, link.columns, square)
        np.add.at(means, link.columns, mean)
        np.add.at(shares, link.columns, 1)
    return squares, means / shares, shares
