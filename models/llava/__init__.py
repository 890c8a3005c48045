"""The LLaVA family: a CLIP, SigLIP or DINOv2 tower, a two-layer projector, Llama or Qwen2."""

from __future__ import annotations

from mquant_jax.models.base import Family
from mquant_jax.models.llava.config import LlavaConfig, config_tables
from mquant_jax.models.llava.modeling import Llava
from mquant_jax.models.llava.processing import collate, example_prompt, reference_batch
from mquant_jax.models.llava.streams import streams
from mquant_jax.models.llava.weights import canonical_name, ignored, unused, weight_rules

FAMILY = Family(
    name="llava",
    config_from_hf=LlavaConfig.from_hf,
    model=Llava,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.llava.processor:LlavaProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    config_tables=config_tables,
    canonical_name=canonical_name,
    unused=unused,
)
