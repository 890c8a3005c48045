"""LLaVA: a vision tower up to one of its layers, a two-layer MLP and the generic decoder."""

from __future__ import annotations

from typing import ClassVar

import jax
from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.nn.act_quant import Points, Tap
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.mlp import ACTIVATIONS
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import VisionInput, ViT
from mquant_jax.recipe import Recipe


class Projector(nnx.Module):
    """A two-layer MLP on the tower's residual stream, without a norm before it."""

    POINTS: ClassVar[Points] = {"merger_in": ("fc1",), "merger_hidden": ("fc2",)}

    def __init__(self, config: LlavaConfig, place: Placement, *, rngs: nnx.Rngs):
        into, out, bias = (
            config.vision.hidden_size, config.language.hidden_size, config.projector_bias
        )  # fmt: skip
        self.activation = config.projector_act
        self.merger_in = place.point("merger_in", self.POINTS)
        self.fc1 = place.dense("fc1", into, out, bias=bias, rngs=rngs)
        rotation = place.online_rotation(out)
        self.merger_hidden = place.point("merger_hidden", self.POINTS, rotation)
        hidden = rotation.n if rotation else out
        self.fc2 = place.dense("fc2", hidden, out, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap | None = None) -> jax.Array:
        """Features ``[N, M, width]`` -> tokens ``[N, M, hidden]`` of the decoder."""
        x = ACTIVATIONS[self.activation](self.fc1(self.merger_in(x, None, tap)))
        return self.fc2(self.merger_hidden(x, None, tap))


class LlavaVision(ViT):
    """Vision tower and projector."""

    def __init__(self, config: LlavaConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, Placement.of(recipe, "vision", dtype), rngs=rngs)
        self.config = config
        self.merger = Projector(config, Placement.of(recipe, "vision/merger", dtype), rngs=rngs)

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
