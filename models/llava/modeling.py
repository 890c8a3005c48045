"""LLaVA: a vision tower up to one of its layers, a two-layer MLP and the generic decoder."""

from __future__ import annotations

import jax
from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.nn.connector import Connector
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import VisionInput, ViT
from mquant_jax.recipe import Recipe


class LlavaVision(ViT):
    """Vision tower, and a projector that reads its residual stream without a norm."""

    def __init__(self, config: LlavaConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, Placement.of(recipe, "vision", dtype), rngs=rngs)
        self.config = config
        out = config.language.hidden_size
        self.merger = Connector(
            (config.vision.hidden_size, out, out), Placement.of(recipe, "vision/merger", dtype),
            activation=config.projector_act, bias=config.projector_bias, rngs=rngs,
        )  # fmt: skip

    def tokens(self, patches: int) -> int:
        return self.config.tokens_of(patches)

    def flow(self, vision: VisionInput) -> Flow[jax.Array]:
        """Patches -> visual tokens ``[N, M, hidden]`` of the decoder."""
        x = yield from self.features(vision)
        # A picture is valid as a whole, including its class token.
        classes = vision.token_class[:, :1].repeat(x.shape[1], axis=1)
        return (yield ModuleCall("vision/merger", self.merger, x, classes))


class Llava(VLM):
    """LLaVA of any size, float or quantised by ``recipe``."""

    VISION = LlavaVision
