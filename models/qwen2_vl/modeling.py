"""Qwen2-VL and Qwen2.5-VL: a rotary vision tower, a 2x2 patch merger and the generic decoder."""

from __future__ import annotations

import jax
from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.nn.act_quant import Tap
from mquant_jax.nn.connector import Connector
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import Features, VisionInput, ViT
from mquant_jax.nn.vit_block import tower_norm
from mquant_jax.recipe import Recipe


class PatchMerger(Connector):
    """A norm, then a two-layer MLP over each 2x2 block of patches."""

    def __init__(self, config: Qwen2VLConfig, place: Placement, normed: int = 1, *, rngs: nnx.Rngs):
        """``normed``: how many patches are normed as one vector."""
        vision, out = config.vision, config.language.hidden_size
        self.block, self.normed = config.merge_size**2, normed
        merged = vision.hidden_size * self.block
        self.norm = tower_norm(
            vision.hidden_size * normed, vision.norm_eps, place, vision.rms_norm, vision.keeps_mean
        )
        super().__init__((merged, merged, out), place, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """Features ``[N, P, width]`` in merge-block order -> tokens ``[N, P/4, hidden]``."""
        n, p, width = x.shape
        x = self.norm(x.reshape(n, p // self.normed, width * self.normed))
        return super().__call__(x.reshape(n, p // self.block, width * self.block), tap)


class Qwen2VLVision(ViT):
    """Vision tower and merger."""

    def __init__(self, config: Qwen2VLConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, Placement.of(recipe, "vision", dtype), rngs=rngs)
        self.merger = PatchMerger(config, Placement.of(recipe, "vision/merger", dtype), rngs=rngs)

    @property
    def patches_per_token(self) -> int:
        return self.merger.block

    def tokens(self, patches: int) -> int:
        return patches // self.merger.block

    def flow(self, vision: VisionInput) -> Flow[Features]:
        """Patches -> visual tokens ``[N, P/4, hidden]`` of the decoder."""
        x = yield from self.features(vision)
        classes = vision.token_class[:, :: self.merger.block]
        return (yield ModuleCall("vision/merger", self.merger, x, classes))


class Qwen2VL(VLM):
    """Qwen2-VL or Qwen2.5-VL of any size, float or quantised by ``recipe``."""

    VISION = Qwen2VLVision
