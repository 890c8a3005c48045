"""Learned scales in bounded memory: a block at a time, by gradient on the block's output.

The block gets what the quantised blocks before it deliver and is to deliver what the float model
has behind it, so that it makes up for some of their errors too. No more than one block is in
memory. The divergence of the predicted tokens, which :mod:`mquant_jax.ptq.tune` follows with the
whole model, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mquant_jax.nn.params import Params
from mquant_jax.ptq.factors import STEP_TOKENS, learned_values, rates, scaled, simulated, start
from mquant_jax.ptq.walk import Inputs
from mquant_jax.recipe import Tuning

_ADAM = optax.scale_by_adam()


def tune_block(
    block: nnx.Module, inputs: Inputs, targets: Sequence[Any], plan: Tuning
) -> tuple[Params, dict[str, float]]:
    """Learn the scales and gains of one block.

    Args:
        block: quantised; used up.
        inputs: its arguments, chunk by chunk: the residual stream ``[B, T, hidden]`` as the
            quantised model has it, and a context all of whose arrays lead with ``B``.
        targets: what the float model has behind the block, chunk by chunk, ``[B, T, hidden]``.

    Returns:
        The learned arrays by their names in the block (of a quantised weight: its scale), and the
        :func:`relative_error` in the ``first`` and ``last`` epoch.
    """
    graphdef, state = simulated(block)
    factors = start(state)
    sizes, moments = rates(factors, plan), _ADAM.init(factors)
    rng = np.random.default_rng(0)
    losses: list[Any] = []
    groups = [[_groups(rng, np.shape(x)) for x in targets] for _ in range(plan.epochs)]
    epoch = sum(map(len, groups[0]))
    decay = optax.cosine_decay_schedule(1.0, plan.epochs * epoch)
    for chunks in groups:
        for n in rng.permutation(len(targets)):  # each is read once
            x, context = inputs[int(n)]
            target = jnp.asarray(targets[int(n)])
            for rows in chunks[n]:
                now = jax.tree.map(lambda size: size * decay(len(losses)), sizes)
                example = (x, target, context), rows
                factors, moments, value = _step(graphdef, state, factors, moments, now, example)
                losses.append(value)
    nnx.update(block, scaled(state, factors))
    first, last = losses[:epoch], losses[-epoch:]
    return learned_values(block), {"first": float(np.mean(first)), "last": float(np.mean(last))}


def relative_error(ours: jax.Array, theirs: jax.Array, token_class: jax.Array) -> jax.Array:
    """Squared distance of two residual streams ``[B, T, hidden]``, relative to the size of
    ``theirs``, token by token; the mean over all tokens but padding (class -1).

    What reads the stream norms it first, so that a relative error is what it sees; and no massive
    token outweighs all others.
    """
    error = jnp.sum((ours - theirs) ** 2, -1) / (jnp.sum(theirs**2, -1) + 1e-30)
    real = token_class >= 0
    return jnp.where(real, error, 0.0).sum() / real.sum()


@partial(jax.jit, static_argnums=0)
def _step(graphdef, state, factors, moments, sizes, example):
    """One step of Adam on some rows of a chunk; also gives the error before it."""
    chunk, rows = example
    x, target, context = jax.tree.map(lambda a: a[rows], chunk)

    def error(factors):
        block = nnx.merge(graphdef, scaled(state, factors))
        return relative_error(block(x, context), target, context.token_class)

    value, slope = jax.value_and_grad(error)(factors)
    direction, moments = _ADAM.update(slope, moments)
    factors = jax.tree.map(lambda f, d, size: f - size * d, factors, direction, sizes)
    return factors, moments, value


def _groups(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Rows of a chunk ``[B, T, hidden]`` in any order, int64 ``[steps, rows of a step]``."""
    together = min(max(1, STEP_TOKENS // shape[1]), shape[0])
    return np.resize(rng.permutation(shape[0]), (-(-shape[0] // together), together))
