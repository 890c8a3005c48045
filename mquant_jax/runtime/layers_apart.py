"""The weights of a decoder's layers as arrays of their own, without a copy.

On CPU a product of several rows takes an array that is nothing but the layer's weights. Out of a
stack XLA first copies them, at every step, which costs a third of the time in which a few rows
decode. A product of one row reads the stack in place. Programs of layers apart are unrolled, so
they take longer to compile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.nn.stack import unrolled

_LEAST = 1 << 16  # values; smaller stacks cost nothing to copy
_LAYERS = ("language", "layers")


class LayersApart:
    """A model's parameters, the weights of the decoder's layers apart.

    Attributes:
        parts: a pytree of arrays, for programs to take; they share the memory of ``params``.

    Args:
        params: on CPU.
    """

    def __init__(self, params: Any):
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._axes = [_stacked_axes(path, leaf) for path, leaf in leaves]
        self.parts = [
            _split(leaf, axes) for (_, leaf), axes in zip(leaves, self._axes, strict=True)
        ]

    def whole(self, parts: Any) -> Any:
        """The parameters again, inside a program. Unrolled, XLA sees through the stacks."""
        leaves = [_stacked(part, axes) for part, axes in zip(parts, self._axes, strict=True)]
        return jax.tree.unflatten(self._tree, leaves)

    def bound(self, step: Any) -> Any:
        """``step(params, ...)`` as a function of ``(parts, ...)``, with its layers unrolled."""

        def run(parts: Any, *rest: Any) -> Any:
            with unrolled():
                return step(self.whole(parts), *rest)

        return run


def _stacked_axes(path: tuple, leaf: jax.Array) -> int:
    """Leading axes to split: layers, and the parts of long rows (see ``QWeight``)."""
    names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path[:2])
    return leaf.ndim - 2 if names == _LAYERS and leaf.ndim > 2 and leaf.size >= _LEAST else 0


def _split(x: Any, axes: int) -> Any:
    if not axes:
        return x
    # JAX's own slices are copies; an aligned view of its memory is taken as it is.
    return [_split(jax.device_put(part, may_alias=True), axes - 1) for part in np.asarray(x)]


def _stacked(part: Any, axes: int) -> jax.Array:
    return jnp.stack([_stacked(one, axes - 1) for one in part]) if axes else part
