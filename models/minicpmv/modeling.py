"""MiniCPM-V: a SigLIP tower over slices, a resampler of learned queries and the generic decoder."""

from __future__ import annotations

from flax import nnx

from mquant_jax.models.base import VLM
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.nn.resampler import ResampledViT
from mquant_jax.recipe import Recipe


class MiniCPMVVision(ResampledViT):
    """Vision tower and resampler; each patch has an index into the position table."""

    def __init__(self, config: MiniCPMVConfig, recipe: Recipe, dtype, *, rngs: nnx.Rngs):
        super().__init__(config.vision, config.resampler, recipe, dtype, rngs=rngs)


class MiniCPMV(VLM):
    """MiniCPM-V of any size, float or quantised by ``recipe``."""

    VISION = MiniCPMVVision
