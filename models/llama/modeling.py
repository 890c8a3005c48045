"""Llama and Qwen2: the generic decoder without pictures."""

from __future__ import annotations

from mquant_jax.models.base import VLM


class Llama(VLM):
    """A Llama or Qwen2 of any size, float or quantised by ``recipe``.

    Its scale tables have the token classes of all models, so that the same pipeline applies; only
    the text entries are used.
    """
