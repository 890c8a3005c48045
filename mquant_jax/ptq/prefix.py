"""Put sinks before every prompt (PrefixQuant, Chen et al. 2024, arXiv 2410.05265).

Massive activations settle on the first tokens of a sequence. If these tokens are always the same
and their keys and values are computed beforehand, no prompt token carries such activations, and no
static scale has to cover them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.lazy import Tensors
from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import TEXT
from mquant_jax.ptq.ledger import Ledger
from mquant_jax.ptq.sinks import flat
from mquant_jax.ptq.states import States
from mquant_jax.ptq.walk import Part, Walk, outputs


def prefix_ids(
    positions: Sequence[int], ids: Sequence[int], batches: Sequence[Batch], count: int
) -> list[int]:
    """Return the tokens of the prefix: the most frequent at the sinks' positions, then sink ids.

    Args:
        positions, ids: as returned by :func:`~mquant_jax.ptq.sinks.find_sinks`.
        count: number of tokens.

    Raises:
        UserError: calibration found fewer.
    """
    tokens, order, classes = flat(batches)
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


def prefix_params(
    model: VLM, params: Tensors, ids: Sequence[int], states: States
) -> dict[str, np.ndarray]:
    """Return keys and values of the tokens ``ids``, at the positions before zero.

    Args:
        model: the abstract float model.
        params: its tensors.

    Returns:
        ``prefix_k`` and ``prefix_v`` of every layer, float32 ``[kv_heads, tokens, head_dim]``.
    """
    visitor = _Keys()
    Walk("prefix", model, params, [_prompt(model, ids)], states, Ledger()).run(visitor)
    return visitor.made


def _prompt(model: VLM, ids: Sequence[int]) -> Batch:
    order = np.arange(len(ids), dtype=np.int32)[None]
    streams = model.language.cfg.position_streams
    return Batch(
        input_ids=np.asarray([ids], np.int32),
        order=order,
        positions=np.repeat(order[None] - len(ids), streams, 0),
        token_class=np.full_like(order, TEXT),
        visual_index=np.full_like(order, -1),
        vision=None,
    )


class _Keys:
    """A visitor that keeps the keys and values of every block."""

    def __init__(self):
        self.made: dict[str, np.ndarray] = {}

    def visit(self, part: Part):
        if part.name.startswith("language/layers/"):
            graphdef, state = nnx.split(part.module)
            k, v = _heads(graphdef, state, *part.inputs[0])
            self.made[f"{part.name}/prefix_k"] = np.asarray(k[0].swapaxes(1, 2))
            self.made[f"{part.name}/prefix_v"] = np.asarray(v[0])
        return outputs(part.module, part.inputs), None

    def record(self, name: str) -> dict[str, Any]:
        return {}

    def restore(self, name: str, record: dict[str, Any]) -> None:
        raise NotImplementedError("a prefix is computed at one go")


@partial(jax.jit, static_argnums=0)
def _heads(graphdef, state, x, ctx):
    block = nnx.merge(graphdef, state)
    return block.heads(*block.qkv(x, ctx, None), ctx)[1:]
