"""The MLP half of a block, plain or gated.

``POINTS`` and ``SIGNS`` are all that others must know of one: building it, calibrating it, and the
declaration of residual streams (:mod:`mquant_jax.models.stack_streams`) read them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import nnx

from mquant_jax.hadamard import Rotation
from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.placement import Placement
from mquant_jax.numerics import QTensor
from mquant_jax.shapes import Array, Float, Int32


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


class MLP(nnx.Module):
    """The MLP half of a block: an activation of its readers, then its last layer.

    Attributes:
        POINTS: the layers that read the stream and, alone, the one that writes to it. An online
            rotation comes before that one.
        SIGNS: a layer that enters the hidden activation linearly and absorbs the signs of the
            online rotation; ``None``: they are applied online.
    """

    POINTS: ClassVar[Points]
    SIGNS: ClassVar[str | None] = None

    def init_mlp(
        self,
        width: int,
        inner: int,
        place: Placement,
        *,
        bias: bool = True,
        reading: Rotation | None = None,
        prefix: str = "",
        rngs: nnx.Rngs,
    ) -> None:
        """
        Args:
            width, inner: channels of the stream and of the hidden activation.
            reading: online rotation of the stream.
            prefix: of the points' names.
        """
        dense = partial(place.dense, bias=bias, rngs=rngs)
        self.mlp_in = place.point("mlp_in", self.POINTS, reading, prefix)
        for name in self.POINTS["mlp_in"]:
            setattr(self, name, dense(name, reading.n if reading else width, inner))
        rotation = place.online_rotation(inner)
        online = rotation.without_signs() if rotation and self.SIGNS else rotation
        self.mlp_hidden = place.point("mlp_hidden", self.POINTS, online, prefix)
        (last,) = self.POINTS["mlp_hidden"]
        hidden = rotation.n if rotation else inner
        setattr(self, last, dense(last, hidden, width, split=place.split))

    @property
    def mlp_last(self) -> Dense:
        """The layer that writes to the stream."""
        (last,) = self.POINTS["mlp_hidden"]
        return getattr(self, last)

    def hidden(
        self,
        h: Float[Array, "B T width"] | QTensor,
        token_class: Int32[Array, "B T"],
        tap: Tap | None,
    ) -> Float[Array, "B T hidden"] | QTensor:
        """The stream as the half reads it -> the input of :attr:`mlp_last`."""
        inner = self.inner(self.mlp_in(h, token_class, tap))
        return self.mlp_hidden(inner, token_class, tap)

    def inner(self, h: Float[Array, "B T width"] | QTensor) -> Float[Array, "B T inner"]:
        """The hidden activation."""
        raise NotImplementedError


class PlainMLP(MLP):
    """``fc2(activation(fc1(x)))``.

    Attributes:
        activation: a key of :data:`ACTIVATIONS`.
    """

    POINTS: ClassVar[Points] = {"mlp_in": ("fc1",), "mlp_hidden": ("fc2",)}
    activation: str
    fc1: Dense

    def inner(self, h: Float[Array, "B T width"] | QTensor) -> Float[Array, "B T inner"]:
        return ACTIVATIONS[self.activation](self.fc1(h))


class GatedMLP(MLP):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    POINTS: ClassVar[Points] = {"mlp_in": ("gate_proj", "up_proj"), "mlp_hidden": ("down_proj",)}
    SIGNS = "up_proj"
    gate_proj: Dense
    up_proj: Dense

    def inner(self, h: Float[Array, "B T width"] | QTensor) -> Float[Array, "B T inner"]:
        return self.up_proj(h, gate=self.gate_proj(h))
