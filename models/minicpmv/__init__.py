"""The MiniCPM-V family: MiniCPM-V 2.6."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from models.base import Family, Processor
from models.minicpmv.config import MiniCPMVConfig
from models.minicpmv.modeling import MiniCPMV
from models.minicpmv.processing import collate, example_prompt, reference_batch
from models.minicpmv.streams import streams
from models.minicpmv.weights import ignored, weight_rules
from mquant_jax.recipe import Recipe


def _build(config: MiniCPMVConfig, recipe: Recipe, dtype, rngs: nnx.Rngs) -> MiniCPMV:
    return MiniCPMV(config, recipe, dtype, rngs=rngs)


def _processor(folder: str | Path, config: MiniCPMVConfig) -> Processor:
    # Pictures and tokenizers are not needed to convert or verify weights.
    from models.minicpmv.processor import MiniCPMVProcessor

    return MiniCPMVProcessor(folder, config)


FAMILY = Family(
    name="minicpmv",
    config_from_hf=MiniCPMVConfig.from_hf,
    build=_build,
    weight_rules=weight_rules,
    ignored=ignored,
    processor=_processor,
    reference_batch=reference_batch,
    example_prompt=example_prompt,
    collate=collate,
    streams=streams,
)
