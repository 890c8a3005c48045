"""ActQuant: the points at which an activation becomes int8 on its way into dense layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.hadamard import Rotation
from mquant_jax.numerics import QTensor, Scale, quantize_dynamic, quantize_static, simulate_static
from mquant_jax.ops.rotate import rotate, rotate_quantize
from mquant_jax.recipe import Section
from mquant_jax.shapes import Array, Float, Int32

# Token classes of the language model's input; -1 is padding. A sink is one of the few tokens (the
# first, mostly) whose activations are massive.
TOKEN_CLASSES = ("text", "visual", "sink")
TEXT, VISUAL, SINK = range(3)
Tap = Callable[[str, jax.Array], jax.Array]
# A module's quantisation points in the order in which they run, each with the Dense layers that
# read it (attribute names).
Points = Mapping[str, tuple[str, ...]]


class ActQuant(nnx.Module):
    """One quantisation point, shared by the Dense layers that read it: rotate if needed, quantise.

    ``none`` is the identity. ``static`` looks the scale up in ``act_scale[n_classes]`` by token
    class (modality-specific scales, paper section 3.1), or uses its only entry. ``dynamic``
    computes one scale per token. Calibration passes a ``tap(name, x)``, which receives the float
    input and returns what replaces it.

    ``rotation`` is an online Hadamard; the readers' weights have absorbed its inverse.
    """

    def __init__(
        self,
        name: str,
        section: Section,
        n_classes: int = 1,
        rotation: Rotation | None = None,
    ):
        self.name = name
        self.rotation = rotation
        self.mode = section.mode(name)
        self.simulated = False  # round but stay in float: for gradients (ptq/tune.py)
        self.n_classes = n_classes
        if self.mode == "static":
            self.act_scale = nnx.Param(jnp.ones((n_classes,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "*tokens K"] | QTensor,
        token_class: Int32[Array, "*tokens"] | None = None,
        tap: Tap | None = None,
    ) -> Float[Array, "*tokens n"] | QTensor:
        """The input of the Dense layers.

        Padding carries class -1 and may get any scale: nothing real ever reads it. What a kernel
        has quantised already, by :meth:`known_scale`, passes.
        """
        if isinstance(x, QTensor):
            return x
        plain = tap is None and not self.simulated
        if self.mode != "none" and self.rotation is not None and plain:
            scale = self._scale(token_class) if self.mode == "static" else None
            return rotate_quantize(x, self.rotation, scale)
        if self.rotation is not None:
            x = rotate(x, self.rotation)
        if tap is not None:
            x = tap(self.name, x)
        if self.mode == "none":
            return x
        if self.mode == "dynamic":
            if self.simulated:
                return x + jax.lax.stop_gradient(quantize_dynamic(x).dequantize() - x)
            return quantize_dynamic(x)
        scale = self._scale(token_class)
        return (simulate_static if self.simulated else quantize_static)(x, scale)

    def known_scale(
        self, token_class: Int32[Array, "*batch"] | None, tap: Tap | None
    ) -> Scale | None:
        """The scale with which the preceding kernel may quantise in place of this point; ``None``:
        it may not."""
        free = self.mode == "static" and self.rotation is None
        return self._scale(token_class) if free and tap is None and not self.simulated else None

    def _scale(self, token_class: Int32[Array, "*batch"] | None) -> Scale:
        scale = self.act_scale.get_value()
        if self.n_classes == 1 or token_class is None:
            return scale[TEXT]
        # Selections fuse with their consumer; a gather would not.
        classes = token_class[..., None]
        chosen = jnp.full(classes.shape, scale[TEXT])
        for cls in range(TEXT + 1, self.n_classes):
            chosen = jnp.where(classes == cls, scale[cls], chosen)
        return chosen
