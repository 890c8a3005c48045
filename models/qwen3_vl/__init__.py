"""The Qwen3-VL family, as far as its language model is dense.

Merger, processing and much of the config are Qwen2-VL's (:mod:`mquant_jax.models.qwen2_vl`).
"""

from __future__ import annotations

import dataclasses

from mquant_jax.models.qwen2_vl import FAMILY as QWEN2_VL
from mquant_jax.models.qwen3_vl.config import config_from_hf, config_tables
from mquant_jax.models.qwen3_vl.modeling import Qwen3VL
from mquant_jax.models.qwen3_vl.processing import reference_batch
from mquant_jax.models.qwen3_vl.streams import streams
from mquant_jax.models.qwen3_vl.weights import weight_rules

FAMILY = dataclasses.replace(
    QWEN2_VL,
    name="qwen3_vl",
    config_from_hf=config_from_hf,
    config_tables=config_tables,
    model=Qwen3VL,
    weight_rules=weight_rules,
    processor_class="mquant_jax.models.qwen3_vl.processor:Qwen3VLProcessor",
    reference_batch=reference_batch,
    streams=streams,
    canonical_name=str,
)
