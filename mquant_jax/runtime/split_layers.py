"""The weights of a model's layers as separate arrays, without a copy.

On CPU a product of several rows takes an array that is nothing but the layer's weights. Out of a
stack XLA first copies them, at every step, which costs almost half of the time in which a few rows
decode or a short prompt is read. A product of one row reads the stack in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mquant_jax.numerics import QWeight
from mquant_jax.per_layer import PerLayer

_LEAST = 1 << 16  # values; smaller stacks cost nothing to copy
_STACKS = (("language", "layers"), ("vision", "layers"))


def split_layers(params: Any) -> Any:
    """Parameters on CPU with one array for each kernel of each layer of both towers; they share the
    memory of ``params``."""
    return jax.tree_util.tree_map_with_path(
        _stack_split, params, is_leaf=lambda leaf: isinstance(leaf, QWeight)
    )


def _stack_split(path: tuple, leaf: Any) -> Any:
    names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
    if names[:2] not in _STACKS or "kernel" not in names:
        return leaf
    if not isinstance(leaf, QWeight):
        return _split(leaf)
    if leaf.storage not in ("int8", "parts"):  # the product unpacks it into an array of its own
        return leaf
    return dataclasses.replace(leaf, values=_split(leaf.values, leaf.storage == "parts"))


def _split(stack: jax.Array, in_parts: bool = False) -> Any:
    if stack.size < _LEAST:
        return stack

    def adopted(x: np.ndarray) -> jax.Array:
        # JAX's own slices are copies; an aligned view of its memory is taken as it is.
        return jax.device_put(x, may_alias=True)

    layers = np.asarray(stack)
    if not in_parts:
        return PerLayer(tuple(adopted(layer) for layer in layers))
    return PerLayer(tuple(tuple(adopted(part) for part in layer) for layer in layers))
