"""GLM-4's and GLM-4V's published tensor names -> ours."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.eva2 import eva2_rules
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.language import dense_rules, direct
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.nn.decoder_block import DecoderConfig


def weight_rules(config: GLM4VConfig) -> list[WeightRule]:
    """One rule per tensor of our model."""
    vision = eva2_rules(config.vision, "transformer.vision.") if config.vision else ()
    return [*vision, *_decoder(config.language)]


def ignored(name: str) -> bool:
    """Return whether a tensor is unused: rotary frequencies are stored, but the published code
    recomputes them."""
    return name.endswith("rotary_pos_emb.inv_freq")


def rope_order(head_dim: int) -> tuple[int, ...]:
    """Return the channels of a head in the order of the generic rope.

    In the published order, the first half of a head rotates in adjacent pairs; here, as two halves.
    Queries and keys are ordered alike, so their products are unchanged.
    """
    rotary = head_dim // 2
    return (*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, head_dim))


def _decoder(c: DecoderConfig) -> Iterator[WeightRule]:
    d, inner, h, kv = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    yield direct("language/embedding", "transformer.embedding.word_embeddings.weight",
                 c.vocab_size, d)  # fmt: skip
    order, fused = rope_order(c.head_dim), (h + 2 * kv) * c.head_dim
    for i in range(c.num_layers):
        dst, src = f"language/layers/{i}", f"transformer.encoder.layers.{i}"
        yield direct(f"{dst}/attn_norm/weight", f"{src}.input_layernorm.weight", d)
        yield direct(f"{dst}/mlp_norm/weight", f"{src}.post_attention_layernorm.weight", d)
        for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
            if leaf == "bias" and not c.qkv_bias:
                continue
            for name, first, heads in (("q_proj", 0, h), ("k_proj", h, kv), ("v_proj", h + kv, kv)):
                yield WeightRule(
                    f"{dst}/{name}/{leaf}",
                    f"{src}.self_attention.query_key_value.{hf}",
                    (heads * c.head_dim, *tail),
                    (fused, *tail),
                    Rows(first, first + heads, h + 2 * kv),
                    order=None if name == "v_proj" else order,
                )
        q = h * c.head_dim
        yield from dense_rules(f"{dst}/o_proj", f"{src}.self_attention.dense", d, q, bias=False)
        for k, name in enumerate(("gate_proj", "up_proj")):
            yield WeightRule(f"{dst}/{name}/kernel", f"{src}.mlp.dense_h_to_4h.weight",
                             (inner, d), (2 * inner, d), Rows(k, k + 1, 2))  # fmt: skip
        yield from dense_rules(f"{dst}/down_proj", f"{src}.mlp.dense_4h_to_h", d, inner, bias=False)
    yield direct("language/norm/weight", "transformer.encoder.final_layernorm.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", "transformer.output_layer.weight", c.vocab_size, d)
