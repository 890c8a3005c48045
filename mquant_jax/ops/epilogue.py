"""What ends a dense layer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import along_last
from mquant_jax.shapes import Array, Float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bias", "residual", "gate"],
    meta_fields=["dtype"],
)
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """``residual + silu(gate) * (product + bias)``, each of them optional.

    Attributes:
        bias: float ``[out]``, added in float32.
        residual: ``dtype [..., out]``, added last.
        gate: ``dtype [..., out]``.
        dtype: of the result, into which the sum of product and bias is rounded.
    """

    bias: jax.Array | None = None
    residual: jax.Array | None = None
    gate: jax.Array | None = None
    dtype: Any = jnp.float32

    def __call__(self, y: Float[Array, "*batch out"]) -> Float[Array, "*batch out"]:
        """Of products."""
        y = y if self.bias is None else y + along_last(self.bias, y)
        y = y.astype(self.dtype)
        y = y if self.gate is None else jax.nn.silu(self.gate) * y
        return y if self.residual is None else self.residual + y

    def flat(self) -> Epilogue:
        """The same for ``[rows, out]``."""
        residual, gate = (
            None if a is None else a.reshape(-1, a.shape[-1]) for a in (self.residual, self.gate)
        )
        return dataclasses.replace(self, residual=residual, gate=gate)


PLAIN = Epilogue()
