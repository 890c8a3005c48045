"""The config.json of Llama and Qwen2 language models -> the shape of our decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.config_keys import FILE, Tables, read_tables
from mquant_jax.models.language_config import SCHEMAS, decoder_config
from mquant_jax.nn.decoder_block import DecoderConfig


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder without a vision tower."""

    language: DecoderConfig

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlamaConfig:
        """Read a config.json, from the hub or written by transformers 5.

        Raises:
            UserError: a key has an invalid value, or is not supported.
        """
        return cls(decoder_config(read_tables(config_tables(hf))[""], hf["model_type"], FILE))


def config_tables(hf: dict[str, Any]) -> Tables:
    """The tables of a config.json."""
    return {"": (SCHEMAS[hf["model_type"]], hf)}
