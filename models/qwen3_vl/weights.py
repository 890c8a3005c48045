"""The published tensor names of Qwen3-VL -> ours, every tensor of them."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.language import decoder_rules, dense_rules, direct, norm_rules
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.weights import block_rules, patch_rule
from mquant_jax.models.qwen3_vl.config import tap_mergers
from mquant_jax.models.rules import WeightRule

_V = "model.visual"


def weight_rules(config: Qwen2VLConfig) -> list[WeightRule]:
    """One rule per tensor of our model (a fused source appears in several rules)."""
    return [*_vision(config), *decoder_rules(config.language, body="model.language_model")]


def _vision(config: Qwen2VLConfig) -> Iterator[WeightRule]:
    v = config.vision
    d, inner, patch = v.hidden_size, v.intermediate_size, f"{_V}.patch_embed.proj"
    yield patch_rule(config, patch)
    yield direct("vision/patch_embed/proj/bias", f"{patch}.bias", d)
    yield direct("vision/positions", f"{_V}.pos_embed.weight", v.position_grid**2, d)
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"{_V}.blocks.{i}"
        yield from block_rules(dst, src, v)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.linear_fc1", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.linear_fc2", d, inner)
    merged = d * config.merge_size**2
    yield from _merger(config, "vision/merger", f"{_V}.merger", d)
    for i, name in enumerate(tap_mergers(v)):
        yield from _merger(config, f"vision/{name}", f"{_V}.deepstack_merger_list.{i}", merged)


def _merger(config: Qwen2VLConfig, dst: str, src: str, normed: int) -> Iterator[WeightRule]:
    """A merger whose norm has ``normed`` channels."""
    merged = config.vision.hidden_size * config.merge_size**2
    yield from norm_rules(f"{dst}/norm", f"{src}.norm", normed)
    yield from dense_rules(f"{dst}/fc1", f"{src}.linear_fc1", merged, merged)
    yield from dense_rules(f"{dst}/fc2", f"{src}.linear_fc2", config.language.hidden_size, merged)
