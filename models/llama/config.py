"""The config.json of Llama and Qwen2 language models -> the shape of our decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from mquant_jax.models.language_config import decoder_config

from mquant_jax.errors import UserError
from mquant_jax.nn.decoder_block import DecoderConfig


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder and nothing else."""

    language: DecoderConfig

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LlamaConfig:
        """Read a config.json, of the hub or as transformers 5 writes it.

        Raises:
            UserError: a key is missing, or asks for something that is not supported.
        """
        try:
            return cls(decoder_config(hf))
        except KeyError as e:
            raise UserError(f"config.json: key {e} is missing ({hf.get('model_type')})") from e
