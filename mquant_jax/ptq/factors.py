"""Parameters for learning a quantised module's scales and gains by gradient.

The integers do not change. Every learned number is multiplied by ``exp(factor)``, so that no sign
can flip and one learning rate suits numbers of all sizes. Factors start at zero.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.nn.params import Params, get_params
from mquant_jax.numerics import QWeight
from mquant_jax.recipe import Tuning

# Tokens per step. Fewer give noisy gradients: with two short prompts per step, activation scales
# learned to clip values they had not seen. Few prompts then mean few steps, and no overfitting.
STEP_TOKENS = 1024
_TABLES = ("head", "embedding")  # their scales are not learned


def simulated(module: nnx.Module) -> tuple[Any, Any]:
    """Return a module (consumed) in a form that gradients pass: graph, and state with one int8 per
    weight."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, ActQuant):
            node.simulated = True
    graphdef, state = nnx.split(module)
    return graphdef, _map(lambda leaf: leaf.unpacked() if is_weight(leaf) else leaf, state)


def start(state: Any) -> Any:
    """Return the factors of a state, all zero."""
    learned = jax.tree_util.tree_map_with_path(_learned, state, is_leaf=is_weight)
    return jax.tree.map(jnp.zeros_like, learned)


def scaled(state: Any, factors: Any) -> Any:
    """Return the state with its learned numbers multiplied by ``exp(factors)``."""
    return _map(_scaled, state, factors)


def rates(factors: Any, plan: Tuning) -> Any:
    """Return the size of the first step for each factor."""

    def rate(path: tuple, leaf: Any) -> float:
        return plan.act_rate if "act_scale" in _names(path) else plan.rate

    return jax.tree_util.tree_map_with_path(rate, factors)


def learned_values(module: nnx.Module) -> Params:
    """Return the arrays that factors may have changed, by name; of a quantised weight its scale."""
    return {
        name: value.scale if is_weight(value) else value
        for name, value in get_params(module).items()
        if is_weight(value) or name.endswith(("act_scale", "norm/weight"))
    }


def placed(old: Any, value: np.ndarray) -> Any:
    """Return the checkpoint tensor ``old`` with one of the :func:`learned_values` put in."""
    if is_weight(old):
        return dataclasses.replace(old, scale=value)
    return value.astype(old.dtype)


def is_weight(leaf: Any) -> bool:
    return isinstance(leaf, QWeight)


_map = partial(jax.tree.map, is_leaf=is_weight)


def _names(path: tuple) -> list[str]:
    return [str(getattr(p, "key", p)) for p in path]


def _learned(path: tuple, leaf: Any) -> jax.Array | None:
    """Return the learned part of a parameter, if there is one."""
    names = _names(path)
    if is_weight(leaf):
        return None if names[0] in _TABLES else leaf.scale
    return leaf if "act_scale" in names or any(n.endswith("norm") for n in names) else None


def _scaled(leaf: Any, factor: jax.Array | None) -> Any:
    if factor is None:
        return leaf
    if is_weight(leaf):
        return dataclasses.replace(leaf, scale=leaf.scale * jnp.exp(factor))
    return leaf * jnp.exp(factor)
