"""The GLM-4V family: GLM-4V-9B, and GLM-4, its text-only model."""

from __future__ import annotations

import dataclasses

from mquant_jax.models.base import Family
from mquant_jax.models.glm4v.config import GLM4VConfig, config_tables
from mquant_jax.models.glm4v.modeling import GLM4, GLM4V
from mquant_jax.models.glm4v.processing import collate, example_prompt, reference_batch
from mquant_jax.models.glm4v.streams import streams
from mquant_jax.models.glm4v.weights import ignored, weight_rules

FAMILY = Family(
    name="glm4v",
    config_from_hf=GLM4VConfig.from_hf,
    model=GLM4V,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.glm4v.processor:GLM4VProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
    config_tables=config_tables,
    most_pictures=1,
)
TEXT_FAMILY = dataclasses.replace(FAMILY, name="glm4", model=GLM4, pictures=False)
