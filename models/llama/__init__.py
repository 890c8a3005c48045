"""Language models without pictures: Llama and Qwen2 (the latter differs by its biases)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from models.base import Batch, Family, Processor, Prompt
from models.llama.config import LlamaConfig
from models.llama.modeling import Llama
from models.llama.processing import collate, example_prompt, reference_batch
from models.llama.streams import streams
from models.llama.weights import ignored, weight_rules
from mquant_jax.recipe import Recipe


def _build(config: LlamaConfig, recipe: Recipe, dtype, rngs: nnx.Rngs) -> Llama:
    return Llama(config, recipe, dtype, rngs=rngs)


def _collate(config: LlamaConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts)


def _processor(folder: str | Path, config: LlamaConfig) -> Processor:
    # Tokenizers are not needed to convert or verify weights.
    from models.llama.processor import LlamaProcessor

    return LlamaProcessor(folder, config)


FAMILY = Family(
    name="llama",
    config_from_hf=LlamaConfig.from_hf,
    build=_build,
    weight_rules=weight_rules,
    ignored=ignored,
    processor=_processor,
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=_collate,
    streams=streams,
    pictures=False,
)
