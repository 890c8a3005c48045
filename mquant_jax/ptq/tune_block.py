"""Learn scales in bounded memory: one block at a time, by gradient descent on the block's output.

The block's inputs come from the quantised blocks before it, and its target is the float model's
output after it. It therefore also corrects some of the earlier blocks' errors. Only one block is
in memory. The divergence of the predicted tokens, which :mod:`mquant_jax.ptq.tune` minimises over
the whole model, is not available here.
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
        block: the quantised block; consumed.
        inputs: its arguments, chunk by chunk: the quantised model's residual stream
            ``[B, T, hidden]``, and a context whose arrays all have the leading axis ``B``.
        targets: the float model's stream after the block, chunk by chunk, ``[B, T, hidden]``.

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
    """Return the relative squared distance of two residual streams ``[B, T, hidden]``.

    The distance is relative to the size of ``theirs``, token by token, and averaged over all tokens
    but padding (class -1). Readers normalise the stream first, so they see relative errors, and no
    massive token outweighs the others.
    """
    error = jnp.sum((ours - theirs) ** 2, -1) / (jnp.sum(theirs**2, -1) + 1e-30)
    real = token_class >= 0
    return jnp.where(real, error, 0.0).sum() / real.sum()


@partial(jax.jit, static_argnums=0)
def _step(graphdef, state, factors, moments, sizes, example):
    """Take one Adam step on some rows of a chunk; also return the error before it."""
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
    """Return the rows of a chunk ``[B, T, hidden]`` in random order, int64 ``[steps, rows per
    step]``."""
    together = min(max(1, STEP_TOKENS // shape[1]), shape[0])
    return np.resize(rng.permutation(shape[0]), (-(-shape[0] // together), together))
