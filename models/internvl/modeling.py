"""InternVL: InternViT over square tiles, pixel shuffle, a two-layer MLP and the generic decoder."""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import jax
from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.mlp import gelu
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import VisionInput, ViT
from mquant_jax.nn.vit_block import tower_norm
from mquant_jax.recipe import Recipe

NORM_EPS = 1e-5  # not in the config: the default of the reference's LayerNorm


def pixel_shuffle(x: jax.Array, merge: int, transposed: bool = False) -> jax.Array:
    """Concatenate squares of ``merge x merge`` patches: ``[N, P, d]`` -> ``[N, P/m^2, m^2 d]``.

    Patches are those of a square picture in row-major order, also within a token. Tokens are in
    row-major order, or column-major if ``transposed``.
    """
    n, p, d = x.shape
    side = isqrt(p) // merge
    x = x.reshape(n, side, merge, side, merge, d)
    axes = (0, 3, 1, 2, 4, 5) if transposed else (0, 1, 3, 2, 4, 5)
    return x.transpose(axes).reshape(n, side * side, merge * merge * d)


class Projector(nnx.Module):
    """Pixel shuffle, LayerNorm over all patches of a token, then a two-layer MLP."""

    POINTS: ClassVar[Points] = {"merger_in": ("fc1",), "merger_hidden": ("fc2",)}

    def __init__(self, config: InternVLConfig, place: Placement, *, rngs: nnx.Rngs):
        self.merge, self.transposed = config.merge, config.transposed
        merged, out = config.vision.hidden_size * self.merge**2, config.language.hidden_size
        self.norm = tower_norm(merged, NORM_EPS, place, keeps_mean=True)
        self.merger_in = place.point("merger_in", self.POINTS)
        self.fc1 = place.dense("fc1", merged, out, rngs=rngs)
        rotation = place.online_rotation(out)
        self.merger_hidden = place.point("merger_hidden", self.POINTS, rotation)
        hidden = rotation.n if rotation else out
        self.fc2 = place.dense("fc2", hidden, out, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """Features ``[N, P, width]`` -> tokens ``[N, P/merge^2, hidden]`` of the decoder."""
        x = self.norm(pixel_shuffle(x, self.merge, self.transposed))
        x = gelu(self.fc1(self.merger_in(x, None, tap)))
        return self.fc2(self.merger_hidden(x, None, tap))


class InternVLVision(ViT):
    """Vision tower and projector."""

    def __init__(self, config: InternVLConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, Placement.of(recipe, "vision", dtype), rngs=rngs)
        self.merger = Projector(config, Placement.of(recipe, "vision/merger", dtype), rngs=rngs)

    def tokens(self, patches: int) -> int:
        return patches // self.merger.merge**2

    def flow(self, vision: VisionInput) -> Flow[jax.Array]:
        """Tiles -> visual tokens ``[N, P/merge^2, hidden]``; the class token is dropped."""
        x = (yield from self.features(vision))[:, 1:]
        classes = vision.token_class[:, :: self.merger.merge**2]  # a tile is valid as a whole
        return (yield ModuleCall("vision/merger", self.merger, x, classes))


class InternVL(VLM):
    """InternVL of any size, float or quantised by ``recipe``."""

    VISION = InternVLVision
