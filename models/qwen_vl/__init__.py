"""The Qwen-VL family: Qwen-VL and Qwen-VL-Chat."""

from __future__ import annotations

from mquant_jax.models.base import Family
from mquant_jax.models.qwen_vl.config import QwenVLConfig, config_tables
from mquant_jax.models.qwen_vl.modeling import QwenVL
from mquant_jax.models.qwen_vl.processing import collate, example_prompt, reference_batch
from mquant_jax.models.qwen_vl.streams import streams
from mquant_jax.models.qwen_vl.weights import ignored, weight_rules

FAMILY = Family(
    name="qwen_vl",
    config_from_hf=QwenVLConfig.from_hf,
    model=QwenVL,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.qwen_vl.processor:QwenVLProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    config_tables=config_tables,
)
