"""Llama and Qwen2: the generic decoder without pictures."""

from __future__ import annotations

from mquant_jax.models.base import VLM


class Llama(VLM):
    """A Llama or Qwen2 of any size, float or quantised as ``recipe`` says.

    Its scale tables have the token classes of all models, so that one pipeline serves all; only the
    text entries are read.
    """
