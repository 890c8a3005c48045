"""The InternVL family: InternVL2 to 3.5, as OpenGVLab publishes them and as transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from models.base import Batch, Family, Processor, Prompt
from models.internvl.config import InternVLConfig
from models.internvl.modeling import InternVL
from models.internvl.processing import collate, example_prompt, placeholder, reference_batch
from models.internvl.streams import streams
from models.internvl.weights import canonical_name, ignored, weight_rules
from mquant_jax.recipe import Recipe


def _build(config: InternVLConfig, recipe: Recipe, dtype, rngs: nnx.Rngs) -> InternVL:
    return InternVL(config, recipe, dtype, rngs=rngs)


def _collate(config: InternVLConfig, prompts: Sequence[Prompt]) -> Batch:
    return collate(prompts, config, placeholder(config))


def _processor(folder: str | Path, config: InternVLConfig) -> Processor:
    # Pictures and tokenizers are not needed to convert or verify weights.
    from models.internvl.processor import InternVLProcessor

    return InternVLProcessor(folder, config)


FAMILY = Family(
    name="internvl",
    config_from_hf=InternVLConfig.from_hf,
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
