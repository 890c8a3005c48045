"""InternVL: InternViT over square tiles, pixel shuffle, a two-layer MLP and the generic decoder."""

from __future__ import annotations

from math import isqrt

import jax
from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.nn.act_quant import Tap
from mquant_jax.nn.connector import Connector
from mquant_jax.nn.flow import Flow, ModuleCall
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


class Projector(Connector):
    """Pixel shuffle, LayerNorm over all patches of a token, then a two-layer MLP."""

    def __init__(self, config: InternVLConfig, place: Placement, *, rngs: nnx.Rngs):
        self.merge, self.transposed = config.merge, config.transposed
        merged, out = config.vision.hidden_size * self.merge**2, config.language.hidden_size
        self.norm = tower_norm(merged, NORM_EPS, place, keeps_mean=True)
        super().__init__((merged, out, out), place, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """Features ``[N, P, width]`` -> tokens ``[N, P/merge^2, hidden]`` of the decoder."""
        return super().__call__(self.norm(pixel_shuffle(x, self.merge, self.transposed)), tap)


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
