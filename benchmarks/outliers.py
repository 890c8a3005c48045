"""Make a model hard to quantise without changing its function.

Trained small models are tame; large ones carry channels that are tens of times larger than the
rest, and channels whose mean is far from zero. The same is brought about here exactly: a channel is
scaled up where it is written and down where it is read, and a constant is added and taken off
again, wherever the algebra allows it: constants through norms and attention, but not through an
activation function. Driven by the family's declared streams.
"""

from __future__ import annotations

import numpy as np

from mquant_jax.lazy import lazy
from mquant_jax.models.streams import Streams
from mquant_jax.nn.params import Params
from mquant_jax.ptq.channels import can_shift, links, scale, shift

CHANNELS = 0.02  # share of channels that become outliers, one at least
LOW, HIGH = 10.0, 100.0
SHIFT = 5.0  # mean of a shifted channel, in sizes of the weights that write it


def _chosen(rng: np.random.Generator, n: int) -> np.ndarray:
    """Indices of the few random channels, out of ``n``, that become outliers."""
    return rng.choice(n, max(1, round(CHANNELS * n)), replace=False)


def _gains(rng: np.random.Generator, n: int) -> np.ndarray:
    """float64 ``[n]``: 1, and 10 to 100 (log-uniform) at a few random channels."""
    gains = np.ones(n)
    chosen = _chosen(rng, n)
    gains[chosen] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), chosen.size))
    return gains


def _offsets(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """float64 like ``sizes``: 0, and at a few channels ``SHIFT`` times the size, of either sign."""
    offsets = np.zeros_like(sizes)
    chosen = _chosen(rng, sizes.size)
    offsets[chosen] = SHIFT * sizes[chosen] * rng.choice([-1.0, 1.0], chosen.size)
    return offsets


def with_outliers(params: Params, streams: Streams, seed: int) -> Params:
    """New float32 tensors of the same function, with channel scales moved along every link, and
    constants along those that let them."""
    rng = np.random.default_rng(seed)
    p = lazy(params)
    for link in links(p, streams):
        scale(p, link, _gains(rng, link.width))
        if can_shift(p, link):
            written = p[next(n for n in link.sources if not n.endswith("/bias"))].load()
            sizes = np.linalg.norm(written.reshape(link.width, -1), axis=1)
            shift(p, link, _offsets(rng, sizes))
    return {name: value.load().astype(np.float32) for name, value in p.items()}
