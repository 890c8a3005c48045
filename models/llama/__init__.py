"""Language models without pictures: Llama and Qwen2 (the latter differs by its biases)."""

from __future__ import annotations

from collections.abc import Sequence

from mquant_jax.models.base import Batch, Family, Prompt
from mquant_jax.models.llama.config import LlamaConfig, config_tables
from mquant_jax.models.llama.modeling import Llama
from mquant_jax.models.llama.processing import collate, example_prompt, reference_batch
from mquant_jax.models.llama.streams import streams
from mquant_jax.models.llama.weights import ignored, weight_rules


def _collate(config: LlamaConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts)


FAMILY = Family(
    name="llama",
    config_from_hf=LlamaConfig.from_hf,
    model=Llama,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.llama.processor:LlamaProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=_collate,
    streams=streams,
    config_tables=config_tables,
    pictures=False,
)
