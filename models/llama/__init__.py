"""Text-only models: Llama and Qwen2 (which differs by its biases)."""

from __future__ import annotations

from mquant_jax.models.base import Family
from mquant_jax.models.llama.config import LlamaConfig, config_tables
from mquant_jax.models.llama.modeling import Llama
from mquant_jax.models.llama.processing import batch_of, example_prompt, reference_batch
from mquant_jax.models.llama.streams import streams
from mquant_jax.models.llama.weights import ignored, weight_rules

FAMILY = Family(
    name="llama",
    config_from_hf=LlamaConfig.from_hf,
    model=Llama,
    weight_rules=weight_rules,
    ignored=ignored,
    processor_class="mquant_jax.models.llama.processor:LlamaProcessor",
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=batch_of,
    streams=streams,
    config_tables=config_tables,
    pictures=False,
)
