"""Make a model hard to quantise without changing its function.

Trained small models are tame; large ones carry channels that are tens of times larger than the
rest. The same is brought about here exactly: a channel is scaled up where it is written and down
where it is read, wherever the algebra allows it. Driven by the family's declared streams.
"""

from __future__ import annotations

import numpy as np

from models.streams import Streams
from mquant_jax.nn.params import Params
from mquant_jax.ptq.channels import links, scale

CHANNELS = 0.02  # share of channels that become outliers, one at least
LOW, HIGH = 10.0, 100.0


def _gains(rng: np.random.Generator, n: int) -> np.ndarray:
    """float64 ``[n]``: 1, and 10 to 100 (log-uniform) at a few random channels."""
    gains = np.ones(n)
    chosen = rng.choice(n, max(1, round(CHANNELS * n)), replace=False)
    gains[chosen] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), chosen.size))
    return gains


def with_outliers(params: Params, streams: Streams, seed: int) -> Params:
    """New float32 tensors of the same function, with channel scales moved along every link."""
    rng = np.random.default_rng(seed)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for link in links(p, streams):
        scale(p, link, _gains(rng, link.width))
    return {name: value.astype(np.float32) for name, value in p.items()}
