"""Make a model hard to quantise without changing its function.

Trained small models are tame; large ones carry channels that are tens of times larger than the
rest. The same is brought about here exactly: a channel is scaled up where it is written and down
where it is read, wherever the algebra allows it. Driven by the family's declared streams.
"""

from __future__ import annotations

import numpy as np

from models.streams import Streams
from mquant_jax.nn.params import Params
from mquant_jax.ptq.rotate import expand, readers_of

CHANNELS = 0.02  # share of channels that become outliers, one at least
LOW, HIGH = 10.0, 100.0


def _gains(rng: np.random.Generator, n: int) -> np.ndarray:
    """float64 ``[n]``: 1, and 10 to 100 (log-uniform) at a few random channels."""
    gains = np.ones(n)
    chosen = rng.choice(n, max(1, round(CHANNELS * n)), replace=False)
    gains[chosen] = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), chosen.size))
    return gains


def with_outliers(params: Params, streams: Streams, seed: int) -> Params:
    """New float32 tensors of the same function.

    Moved are channel scales between norms and their readers, between values and output
    projections, and between the linear half of a gated MLP and its last layer.
    """
    rng = np.random.default_rng(seed)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for stream in streams.streams:
        for read in stream.reads:
            for norm in expand(read.norm, p):
                gains = _gains(rng, stream.width)
                for leaf in ("weight", "bias"):
                    if f"{norm}/{leaf}" in p:
                        p[f"{norm}/{leaf}"] = p[f"{norm}/{leaf}"] * gains
                for reader in readers_of(read, norm):
                    p[f"{reader}/kernel"] = p[f"{reader}/kernel"] / np.tile(gains, read.blocks)
    for attention in streams.attentions:
        for value, output in zip(
            expand(attention.value, p), expand(attention.output, p), strict=True
        ):
            gains = _gains(rng, len(p[f"{value}/kernel"]))
            _scale_rows(p, value, gains)
            heads = gains.reshape(-1, attention.head_dim)
            shared = p[f"{output}/kernel"].shape[1] // gains.size
            p[f"{output}/kernel"] = p[f"{output}/kernel"] / np.repeat(heads, shared, 0).ravel()
    for hidden in streams.hiddens:
        if hidden.sign_carrier:
            for carrier, reader in zip(
                expand(hidden.sign_carrier, p), expand(hidden.reader, p), strict=True
            ):
                gains = _gains(rng, hidden.width)
                _scale_rows(p, carrier, gains)
                p[f"{reader}/kernel"] = p[f"{reader}/kernel"] / gains
    return {name: value.astype(np.float32) for name, value in p.items()}


def _scale_rows(p: Params, name: str, gains: np.ndarray) -> None:
    p[f"{name}/kernel"] = p[f"{name}/kernel"] * gains[:, None]
    if f"{name}/bias" in p:
        p[f"{name}/bias"] = p[f"{name}/bias"] * gains
