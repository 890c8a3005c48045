"""The two dense layers in which most connectors end."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from flax import nnx

from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.placement import Placement
from mquant_jax.shapes import Array, Float


class Connector(nnx.Module):
    """``fc2(activation(fc1(x)))``; an online rotation comes before ``fc2``."""

    POINTS: ClassVar[Points] = {"merger_in": ("fc1",), "merger_hidden": ("fc2",)}

    def __init__(
        self,
        widths: tuple[int, int, int],
        place: Placement,
        *,
        activation: str = "gelu",
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        """
        Args:
            widths: channels before, between and after the layers.
            activation: a key of :data:`~mquant_jax.nn.mlp.ACTIVATIONS`.
        """
        dense, (into, inner, out) = partial(place.dense, bias=bias, rngs=rngs), widths
        self.activation = activation
        self.merger_in = place.point("merger_in", self.POINTS)
        self.fc1 = dense("fc1", into, inner)
        rotation = place.online_rotation(inner)
        self.merger_hidden = place.point("merger_hidden", self.POINTS, rotation)
        self.fc2 = dense("fc2", rotation.n if rotation else inner, out)

    def __call__(
        self, x: Float[Array, "N M into"], tap: Tap | None = None
    ) -> Float[Array, "N M out"]:
        """Features -> tokens."""
        x = ACTIVATIONS[self.activation](self.fc1(self.merger_in(x, None, tap)))
        return self.fc2(self.merger_hidden(x, None, tap))
