"""The published tensor names of Llama and Qwen2 -> ours."""

from __future__ import annotations

from mquant_jax.models.language import decoder_rules
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.rules import WeightRule


def weight_rules(config: LlamaConfig) -> list[WeightRule]:
    """One rule per tensor of our model."""
    return list(decoder_rules(config.language))


def ignored(name: str) -> bool:
    """Whether a tensor is unused: tables in older checkpoints that are computed here."""
    return name.endswith("rotary_emb.inv_freq")
