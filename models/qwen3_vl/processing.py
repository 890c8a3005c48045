"""Qwen3-VL's prompts: Qwen2-VL's, in which each temporal patch of a clip is a picture."""

from __future__ import annotations

import numpy as np

from mquant_jax.models.base import Batch
from mquant_jax.models.qwen2_vl import processing
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig


def reference_batch(config: Qwen2VLConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs (transformers' own argument names) as one batch of the same length."""
    grids = inputs.get("video_grid_thw")
    if grids is not None:
        frames = np.repeat(grids, grids[:, 0], axis=0)
        frames[:, 0] = 1
        inputs = {**inputs, "video_grid_thw": frames}
    return processing.reference_batch(config, inputs)
