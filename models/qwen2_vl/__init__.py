"""The Qwen2-VL family."""

from __future__ import annotations

from collections.abc import Sequence

from mquant_jax.models.base import Batch, Family, Prompt
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig, config_tables
from mquant_jax.models.qwen2_vl.modeling import Qwen2VL
from mquant_jax.models.qwen2_vl.processing import collate, example_prompt, reference_batch
from mquant_jax.models.qwen2_vl.streams import streams
from mquant_jax.models.qwen2_vl.weights import canonical_name, ignored, weight_rules


def _collate(config: Qwen2VLConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts, config, pad_id=0)


FAMILY = Family(
    name="qwen2_vl",
    config_from_hf=Qwen2VLConfig.from_hf,
    model=Qwen2VL,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.qwen2_vl.processor:Qwen2VLProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=_collate,
    streams=streams,
    config_tables=config_tables,
    videos=True,
    canonical_name=canonical_name,
)
