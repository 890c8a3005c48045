"""The CogVLM2 family: CogVLM2-Llama3-19B."""

from __future__ import annotations

from mquant_jax.models.base import Family
from mquant_jax.models.cogvlm2.config import CogVLM2Config, config_tables
from mquant_jax.models.cogvlm2.modeling import CogVLM2
from mquant_jax.models.cogvlm2.processing import collate, example_prompt, reference_batch
from mquant_jax.models.cogvlm2.streams import streams
from mquant_jax.models.cogvlm2.weights import ignored, weight_rules

FAMILY = Family(
    name="cogvlm2",
    config_from_hf=CogVLM2Config.from_hf,
    model=CogVLM2,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.cogvlm2.processor:CogVLM2Processor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    config_tables=config_tables,
    most_pictures=1,
)
