"""The Qwen2-VL family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from models.base import Batch, Family, Processor, Prompt
from models.qwen2_vl.config import Qwen2VLConfig
from models.qwen2_vl.modeling import Qwen2VL
from models.qwen2_vl.processing import collate, example_prompt, reference_batch
from models.qwen2_vl.streams import streams
from models.qwen2_vl.weights import canonical_name, ignored, weight_rules
from mquant_jax.recipe import Recipe


def _build(config: Qwen2VLConfig, recipe: Recipe, dtype, rngs: nnx.Rngs) -> Qwen2VL:
    return Qwen2VL(config, recipe, dtype, rngs=rngs)


def _collate(config: Qwen2VLConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts, config, pad_id=0)


def _processor(folder: str | Path, config: Qwen2VLConfig) -> Processor:
    # Pictures and tokenizers are not needed to convert or verify weights.
    from models.qwen2_vl.processor import Qwen2VLProcessor

    return Qwen2VLProcessor(folder, config)


FAMILY = Family(
    name="qwen2_vl",
    config_from_hf=Qwen2VLConfig.from_hf,
    build=_build,
    weight_rules=weight_rules,
    ignored=ignored,
    processor=_processor,
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=_collate,
    streams=streams,
    canonical_name=canonical_name,
)
