"""Sinks in front of every prompt (PrefixQuant, Chen et al. 2024, arXiv 2410.05265).

Massive activations settle on the first tokens of a sequence. Where these are always the same, and
their keys and values are known beforehand, no token of a prompt has to carry such activations, and
no static scale has to hold them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import TEXT
from mquant_jax.nn.params import Params
from mquant_jax.nn.stack import num_layers


def prefix_ids(positions: Sequence[int], ids: Sequence[int], batch: Batch, count: int) -> list[int]:
    """The tokens of the prefix: those that most often stand where sinks do, then the sinks among
    token ids.

    Args:
        positions, ids: as :func:`~mquant_jax.ptq.sinks.find_sinks` gives them.
        count: how many.

    Raises:
        UserError: calibration shows fewer.
    """
    known = [np.asarray(a) for a in (batch.input_ids, batch.order, batch.token_class)]
    tokens, order, classes = known
    chosen: list[int] = []
    for place in positions:
        seen = tokens[(order == place) & (classes == TEXT)].tolist()
        chosen += [t for t, _ in Counter(seen).most_common(1)]
    chosen += [t for t in ids if t not in chosen]
    if len(chosen) < count:
        raise UserError(
            f"recipe: prefix_sinks is {count}, but calibration shows {len(chosen)} sinks"
        )
    return chosen[:count]


def prefix_params(model: VLM, ids: Sequence[int]) -> Params:
    """Keys and values of the tokens ``ids``, which stand at the positions before zero.

    Args:
        model: the float model.

    Returns:
        ``prefix_k`` and ``prefix_v`` of every layer, float32 ``[kv_heads, tokens, head_dim]``.
    """
    n, language = len(ids), model.language
    tokens, order = jnp.asarray([ids], jnp.int32), jnp.arange(n, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(order - n, (len(language.cfg.rope_sections), 1, n))
    _, cache = language.step(
        language.embed(tokens), positions, order, jnp.full((1, n), TEXT), language.init_cache(1, n),
        fresh=True,
    )  # fmt: skip
    return {
        f"language/layers/{i}/prefix_{name}": np.asarray(value)
        for i in range(num_layers(language.layers))
        for name, value in (("k", cache.k[i, 0].swapaxes(1, 2)), ("v", cache.v[i, 0]))
    }
