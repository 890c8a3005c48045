"""Qwen3-VL: a tapped vision tower, a merger for it and for each tap, and the generic decoder."""

from __future__ import annotations

from mquant_jax.models.base import VLM
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.modeling import PatchMerger, Qwen2VLVision
from mquant_jax.models.qwen3_vl.config import tap_mergers
from mquant_jax.nn.flow import Flow, ModuleCall
from mquant_jax.nn.placement import Placement
from mquant_jax.nn.vit import Features, VisionInput
from mquant_jax.recipe import Recipe


class Qwen3VLVision(Qwen2VLVision):
    """Vision tower and mergers; those of the taps norm a whole block of patches."""

    def __init__(self, config: Qwen2VLConfig, recipe: Recipe, dtype, *, rngs):
        super().__init__(config, recipe, dtype, rngs=rngs)
        for name in tap_mergers(config.vision):
            place = Placement.of(recipe, f"vision/{name}", dtype)
            setattr(self, name, PatchMerger(config, place, config.merge_size**2, rngs=rngs))

    def flow(self, vision: VisionInput) -> Flow[Features]:
        """Patches -> visual tokens, and what the decoder adds after its first layers, each
        ``[N, P/4, hidden]``."""
        x, tapped = yield from self.tapped(vision)
        classes = vision.token_class[:, :: self.merger.block]
        parts = [(yield ModuleCall("vision/merger", self.merger, x, classes))]
        for name, tap in zip(tap_mergers(self.cfg), tapped, strict=True):
            merger = getattr(self, name)
            call = ModuleCall(f"vision/{name}", merger, tap, classes, passed_on=True)
            parts.append((yield call))
        return tuple(parts)


class Qwen3VL(VLM):
    """Qwen3-VL of any size, float or quantised as ``recipe`` says."""

    VISION = Qwen3VLVision
