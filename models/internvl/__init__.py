"""The InternVL family: InternVL2 to 3.5, in OpenGVLab's and in transformers' format."""

from __future__ import annotations

from collections.abc import Sequence

from mquant_jax.models.base import Batch, Family, Prompt
from mquant_jax.models.internvl.config import InternVLConfig, config_tables
from mquant_jax.models.internvl.modeling import InternVL
from mquant_jax.models.internvl.processing import (
    collate,
    example_prompt,
    placeholder,
    reference_batch,
)
from mquant_jax.models.internvl.streams import streams
from mquant_jax.models.internvl.weights import canonical_name, ignored, weight_rules


def _collate(config: InternVLConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts, config, placeholder(config))


FAMILY = Family(
    name="internvl",
    config_from_hf=InternVLConfig.from_hf,
    model=InternVL,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.internvl.processor:InternVLProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=_collate,
    streams=streams,
    config_tables=config_tables,
    videos=True,
    canonical_name=canonical_name,
)
