"""DeepStack: visual features that enter the decoder's stream after its first layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import AnyArray
from mquant_jax.shapes import Array, Float, Int32


def rows_of(features: Any, index: Int32[AnyArray, "B T"]) -> Float[Array, "B T hidden"]:
    """The row of some features for each token, and zeros without one.

    Args:
        features: ``[..., hidden]``, rows counted over all axes but the last.
        index: -1: none.
    """
    features, index = jnp.asarray(features), jnp.asarray(index)
    rows = features.reshape(-1, features.shape[-1])[index]
    return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), rows.dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["features", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DeepFeatures:
    """What is added to the stream after layers 0, 1, ... of a decoder.

    Attributes:
        features: of each layer, as :func:`rows_of` takes them, or handles that load such.
        index: int32 ``[B, T]``, the row of each token; -1: nothing is added to it.
    """

    features: tuple[Any, ...]
    index: AnyArray

    def at_layer(self, layer: int) -> Float[Array, "B T hidden"] | None:
        """What is added after one layer; ``None`` after the last one."""
        return rows_of(self.features[layer], self.index) if layer < len(self.features) else None

    def stacked(self) -> Float[Array, "layers B T hidden"]:
        """Each layer's, then one of zeros for the rest."""
        found = [rows_of(f, self.index) for f in self.features]
        return jnp.stack([*found, jnp.zeros_like(found[0])])
