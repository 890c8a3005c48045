"""A stack of layers' matrices as one array per layer, for products that would copy a slice.

On CPU a product of several rows takes its operands from arrays of their own. XLA therefore copies a
layer's matrix out of its stack before each product. :func:`by_layer` branches on the layer instead:
each branch holds nothing but the product with one layer's array, so a scan over the layers copies
nothing, and its program hardly grows with their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "layer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A stack ``[layers, out, in]``, or ``[layers, parts, out, in / parts]``.

    Attributes:
        layers: for each layer an array ``[out, in]``, or the tuple of its parts.
        layer: int32 ``[]``: the object stands for this layer alone. ``None``: for the stack.
    """

    layers: tuple[Any, ...]
    layer: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The stack's, or the layer's."""
        one = self.layers[0]
        stack = (len(self.layers),) if self.layer is None else ()
        if isinstance(one, tuple):
            return *stack, len(one), *one[0].shape
        return *stack, *one.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[PerLayer]:
        """The parts of one layer."""
        for part in range(len(self)):
            yield PerLayer(tuple(one[part] for one in self.layers), self.layer)

    def of_layer(self, layer: jax.Array) -> PerLayer:
        """The layer with this index, int32 ``[]``."""
        return dataclasses.replace(self, layer=layer)


def by_layer(
    product: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, w: jax.Array | PerLayer
) -> jax.Array:
    """``product(x, w)``, of a :class:`PerLayer` with its ``layer``."""
    if not isinstance(w, PerLayer):
        return product(x, w)
    branches = [lambda x, one=one: product(x, one) for one in w.layers]
    return jax.lax.switch(w.layer, branches, x)
