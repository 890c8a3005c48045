"""Llama and Qwen2: the generic decoder, and no pictures in front of it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from models.base import VLM
from models.llama.config import LlamaConfig
from mquant_jax.nn.decoder import Decoder
from mquant_jax.nn.placement import Placement
from mquant_jax.recipe import Recipe


class Llama(VLM):
    """A Llama or Qwen2 of any size, float or quantised as ``recipe`` says.

    Its scale tables have the classes of every model, so that one pipeline serves all; only the
    text entries are ever read.
    """

    def __init__(
        self,
        config: LlamaConfig,
        recipe: Recipe | None = None,
        dtype=jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        recipe = recipe or Recipe()
        self.config = config
        place = Placement.of(recipe, "language", dtype)
        self.language = Decoder(config.language, place, recipe.head, rngs=rngs)
