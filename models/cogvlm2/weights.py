"""CogVLM2's published tensor names -> ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.eva2 import eva2_rules
from mquant_jax.models.language import dense_rules, direct
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.rope import frequencies


def weight_rules(config: CogVLM2Config) -> list[WeightRule]:
    """One rule per tensor of our model."""
    return [*eva2_rules(config.vision, "model.vision."), *_decoder(config.language)]


def ignored(name: str) -> bool:
    """Every published tensor is used."""
    return False


def _decoder(c: DecoderConfig) -> Iterator[WeightRule]:
    d, inner, h, kv = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    fused = (h + 2 * kv) * c.head_dim
    computed = tuple(frequencies(c.head_dim, c.rope_theta).tolist())
    yield direct("language/embedding", "model.embed_tokens.weight", c.vocab_size, d)
    for i in range(c.num_layers):
        block, src = f"language/layers/{i}", f"model.layers.{i}"
        yield direct(f"{block}/attn_norm/weight", f"{src}.input_layernorm.weight", d)
        yield direct(f"{block}/mlp_norm/weight", f"{src}.post_attention_layernorm.weight", d)
        # The published ones were rounded to bfloat16 and differ from the formula's.
        stored = direct(f"{block}/frequencies", f"{src}.self_attn.rotary_emb.inv_freq",
                        c.head_dim // 2)  # fmt: skip
        yield dataclasses.replace(stored, otherwise=computed)
        for dst, expert in ((block, "language"), (f"{block}/visual", "vision")):
            attention = f"{src}.self_attn.{expert}_expert"
            leaves = [("kernel", "weight", (d,)), ("bias", "bias", ())]
            for leaf, hf, tail in leaves if expert == "vision" else leaves[:1]:
                for name, first, n in (("q_proj", 0, h), ("k_proj", h, kv), ("v_proj", h + kv, kv)):
                    yield WeightRule(
                        f"{dst}/{name}/{leaf}",
                        f"{attention}_query_key_value.{hf}",
                        (n * c.head_dim, *tail),
                        (fused, *tail),
                        Rows(first, first + n, h + 2 * kv),
                    )
            q = h * c.head_dim
            yield from dense_rules(f"{dst}/o_proj", f"{attention}_dense", d, q, bias=False)
            mlp = f"{src}.mlp.{expert}_mlp"
            for name in ("gate_proj", "up_proj"):
                yield from dense_rules(f"{dst}/{name}", f"{mlp}.{name}", inner, d, bias=False)
            yield from dense_rules(f"{dst}/down_proj", f"{mlp}.down_proj", d, inner, bias=False)
    yield direct("language/norm/weight", "model.norm.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", "lm_head.weight", c.vocab_size, d)
