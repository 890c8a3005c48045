"""The MiniCPM-V family: MiniCPM-V 2.6."""

from __future__ import annotations

from mquant_jax.models.base import Family
from mquant_jax.models.minicpmv.config import MiniCPMVConfig, config_tables
from mquant_jax.models.minicpmv.modeling import MiniCPMV
from mquant_jax.models.minicpmv.processing import collate, example_prompt, reference_batch
from mquant_jax.models.minicpmv.streams import streams
from mquant_jax.models.minicpmv.weights import ignored, weight_rules

FAMILY = Family(
    name="minicpmv",
    config_from_hf=MiniCPMVConfig.from_hf,
    model=MiniCPMV,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.minicpmv.processor:MiniCPMVProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    config_tables=config_tables,
    videos=True,
)
