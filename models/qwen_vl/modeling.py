"""Qwen-VL: an OpenCLIP tower over square pictures, a resampler and the generic decoder."""

from __future__ import annotations

from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.nn.resampler import ResampledViT
from mquant_jax.recipe import Recipe


class QwenVLVision(ResampledViT):
    """Vision tower and resampler."""

    def __init__(self, config: QwenVLConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, config.resampler, recipe, dtype, rngs=rngs)


class QwenVL(VLM):
    """Qwen-VL of any size, float or quantised by ``recipe``."""

    VISION = QwenVLVision
