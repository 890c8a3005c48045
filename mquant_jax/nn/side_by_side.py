"""Concatenates the small arrays of a stack, so that one slice gives all values of a layer.

On TPU, slicing one activation scale out of its stack takes one or two instructions of about two
thousand cycles each by XLA's estimate. (Longer arrays gain nothing: an unaligned slice must be
moved to a register boundary.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LONGEST = 8  # entries of a layer


def joined(stacks: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree of arrays ``[layers, ...]`` -> one with fewer, and what restores a layer of it.

    Returns:
        A tree of arrays ``[layers, ...]``: those that are long, and of the others one
        ``[layers, n]`` for each type. A function: this tree without its leading axis, as a scan
        cuts it -> the given tree without it.
    """
    leaves, tree = jax.tree.flatten(stacks)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    alone = {i: leaf for i, leaf in enumerate(leaves) if sizes[i] > LONGEST}
    rows: dict[str, list[jax.Array]] = {}
    places: dict[int, tuple[str, int]] = {}
    for i, leaf in enumerate(leaves):
        if i not in alone:
            row = rows.setdefault(str(leaf.dtype), [])
            places[i] = str(leaf.dtype), sum(part.shape[1] for part in row)
            row.append(leaf.reshape(len(leaf), sizes[i]))

    def restored(layer: tuple[dict, dict]) -> Any:
        parts, vectors = layer
        out = []
        for i, leaf in enumerate(leaves):
            if i in parts:
                out.append(parts[i])
                continue
            kind, start = places[i]
            out.append(vectors[kind][start : start + sizes[i]].reshape(leaf.shape[1:]))
        return jax.tree.unflatten(tree, out)

    return (alone, {kind: jnp.concatenate(row, axis=1) for kind, row in rows.items()}), restored
