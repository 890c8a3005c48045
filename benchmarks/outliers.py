"""Make a model hard to quantise without changing its function.

Small trained models have few outliers. Large ones have channels tens of times larger than the rest,
and channels whose mean is far from zero. This module creates both exactly. It scales a channel up
where it is written and down where it is read. It adds a constant and subtracts it again where the
algebra allows: through norms and attention, but not through an activation function. The family's
declared streams say where.
"""

from __future__ import annotations

import numpy as np

from mquant_jax.lazy import lazy
from mquant_jax.models.streams import Streams
from mquant_jax.nn.params import Params
from mquant_jax.ptq.channels import can_shift, links, scale, shift

CHANNELS = 0.02  # share of channels that become outliers, at least one
LOW, HIGH = 10.0, 100.0
SHIFT = 5.0  # mean of a shifted channel, relative to the norm of the weights that write it


def _chosen(rng: np.random.Generator, n: int) -> np.ndarray:
    """Choose a few of ``n`` channels at random to become outliers; return their indices."""
    return rng.choice(n, max(1, round(CHANNELS * n)), replace=False)


def _gains(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return float64 ``[n]``: 10 to 100 (log-uniform) at a few random channels, 1 elsewhere."""
    gains = np.ones(n)
    chosen = _chosen(rng, n)
    gains[chosen] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), chosen.size))
    return gains


def _offsets(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Return float64 like ``sizes``: ``SHIFT`` times the size with a random sign at a few channels,
    0 elsewhere."""
    offsets = np.zeros_like(sizes)
    chosen = _chosen(rng, sizes.size)
    offsets[chosen] = SHIFT * sizes[chosen] * rng.choice([-1.0, 1.0], chosen.size)
    return offsets


def with_outliers(params: Params, streams: Streams, seed: int) -> Params:
    """Return float32 tensors of the same function, with channel scales moved along every link and
    constants along every link that can carry them."""
    rng = np.random.default_rng(seed)
    p = lazy(params)
    for link in links(p, streams):
        scale(p, link, _gains(rng, link.width))
        if can_shift(p, link):
            written = p[next(n for n in link.sources if not n.endswith("/bias"))].load()
            sizes = np.linalg.norm(written.reshape(link.width, -1), axis=1)
            shift(p, link, _offsets(rng, sizes))
    return {name: value.load().astype(np.float32) for name, value in p.items()}
