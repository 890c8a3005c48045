"""Our own models: float32, and W4A8 with static and with dynamic activation scales.

Both quantised models come from one conversion with the preset ``w4a8`` on a few windows of text.
Their scales are not tuned, because speed does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy import built, quantised_params
from benchmarks.peers.base import Peer, Source
from mquant_jax.eval.speed import Greedy
from mquant_jax.models.base import VLM
from mquant_jax.models.llama.processing import collate, text_prompt
from mquant_jax.nn.params import get_params, parameter_bytes
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.presets import PRESETS
from mquant_jax.recipe import Recipe


class Ours:
    """One of our models behind the peers' interface; decoding is one compiled loop."""

    def __init__(self, module: VLM, source: Source, settings: str):
        self.settings = settings
        self.weight_bytes = parameter_bytes(get_params(module))
        self.greedy = Greedy(module, source.new_tokens)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.greedy.prefill(collate([text_prompt(tokens)]))

    def decode(self, n: int) -> list[int]:
        tokens = self.greedy.decode(jnp.int32(n + 1))
        return np.asarray(tokens)[0, : n + 1].tolist()


def build(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    if "float32" in names:
        module = built(source, source.config, Recipe(), source.params)
        yield "float32", Ours(module, source, "XLA, tied head")
    quantised = [n for n in names if n in PRESETS]
    if not quantised:
        return
    _, config, params = quantised_params(source, PRESETS["w4a8"])
    params = {k: held(v) if isinstance(v, QWeight) else v for k, v in params.items()}
    for name in quantised:
        recipe = PRESETS[name]
        scales = recipe.language.activations
        settings = f"{scales} int8 activations, int8 head, int4 weights held as int8"
        yield name, Ours(built(source, config, recipe, params), source, settings)
