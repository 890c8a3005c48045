"""Qwen-VL's published tensor names -> ours."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.language import dense_rules, direct, norm_rules
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.resampler import resampler_rules
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.nn.decoder_block import DecoderConfig

_V = "transformer.visual"
_QKV = ("q_proj", "k_proj", "v_proj")


def weight_rules(config: QwenVLConfig) -> list[WeightRule]:
    """One rule per tensor of our model (fused projections appear in three, the resampler's
    positions in two)."""
    return [
        *_tower(config),
        *resampler_rules(config.resampler, f"{_V}.attn_pool", _V),
        *_decoder(config.language),
    ]


def ignored(name: str) -> bool:
    """Whether a tensor is unused: tables in some copies that are computed here."""
    return name.endswith(("rotary_emb.inv_freq", "attn.masked_bias", "transformer.logn_tensor"))


def _fused(dst: str, src: str, width: int, groups: int = 1) -> Iterator[WeightRule]:
    """Queries, keys and values from one layer: consecutive in each of ``groups`` parts."""
    for leaf, hf, tail in (("kernel", "weight", (width,)), ("bias", "bias", ())):
        for i, name in enumerate(_QKV):
            yield WeightRule(f"{dst}/{name}/{leaf}", f"{src}.{hf}", (width, *tail),
                             (3 * width, *tail), Rows(i, i + 1, 3, groups))  # fmt: skip


def _tower(config: QwenVLConfig) -> Iterator[WeightRule]:
    v, p = config.vision, config.patch_size
    d, inner = v.hidden_size, v.intermediate_size
    yield WeightRule("vision/patch_embed/proj/kernel", f"{_V}.conv1.weight", (d, v.patch_dim),
                     (d, 3, p, p))  # fmt: skip
    yield direct("vision/positions", f"{_V}.positional_embedding", v.position_grid**2, d)
    yield from norm_rules("vision/input/norm", f"{_V}.ln_pre", d)
    for i in range(v.num_layers):
        dst, src = f"vision/layers/{i}", f"{_V}.transformer.resblocks.{i}"
        yield from norm_rules(f"{dst}/attn_norm", f"{src}.ln_1", d)
        yield from norm_rules(f"{dst}/mlp_norm", f"{src}.ln_2", d)
        yield from _fused(dst, f"{src}.attn.in_proj", d, v.num_heads)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attn.out_proj", d, d)
        yield from dense_rules(f"{dst}/fc1", f"{src}.mlp.c_fc", inner, d)
        yield from dense_rules(f"{dst}/fc2", f"{src}.mlp.c_proj", d, inner)


def _decoder(c: DecoderConfig) -> Iterator[WeightRule]:
    """Queries, keys and values are consecutive; the gate is the second of the MLP's two layers."""
    d, inner = c.hidden_size, c.intermediate_size
    yield direct("language/embedding", "transformer.wte.weight", c.vocab_size, d)
    for i in range(c.num_layers):
        dst, src = f"language/layers/{i}", f"transformer.h.{i}"
        yield direct(f"{dst}/attn_norm/weight", f"{src}.ln_1.weight", d)
        yield direct(f"{dst}/mlp_norm/weight", f"{src}.ln_2.weight", d)
        yield from _fused(dst, f"{src}.attn.c_attn", d)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attn.c_proj", d, d, c.o_bias)
        yield from dense_rules(f"{dst}/up_proj", f"{src}.mlp.w1", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/gate_proj", f"{src}.mlp.w2", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/down_proj", f"{src}.mlp.c_proj", d, inner, c.mlp_bias)
    yield direct("language/norm/weight", "transformer.ln_f.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", "lm_head.weight", c.vocab_size, d)
