"""Shared by families' language models: published tensor names."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.nn.decoder_block import DecoderConfig


def direct(dst: str, src: str, *shape: int) -> WeightRule:
    """Return the rule of a tensor that is copied unchanged."""
    return WeightRule(dst, src, shape, shape)


def dense_rules(dst: str, src: str, out: int, into: int, bias: bool = True) -> Iterator[WeightRule]:
    """Yield the rules of a dense layer: kernel ``[out, into]`` and bias ``[out]``."""
    yield direct(f"{dst}/kernel", f"{src}.weight", out, into)
    if bias:
        yield direct(f"{dst}/bias", f"{src}.bias", out)


def norm_rules(dst: str, src: str, width: int, bias: bool = True) -> Iterator[WeightRule]:
    """Yield the rules of a norm: weight and bias ``[width]``."""
    for leaf in ("weight", "bias") if bias else ("weight",):
        yield direct(f"{dst}/{leaf}", f"{src}.{leaf}", width)


def decoder_rules(c: DecoderConfig, prefix: str = "", body: str = "model") -> Iterator[WeightRule]:
    """Return the rules of a decoder under Llama's names, which most others kept.

    Args:
        prefix: precedes all names if the decoder is part of a larger model.
        body: what holds everything but the head.
    """
    body = f"{prefix}{body}"
    d, inner = c.hidden_size, c.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield direct("language/embedding", f"{body}.embed_tokens.weight", c.vocab_size, d)
    for i in range(c.num_layers):
        dst, src = f"language/layers/{i}", f"{body}.layers.{i}"
        yield direct(f"{dst}/attn_norm/weight", f"{src}.input_layernorm.weight", d)
        yield direct(f"{dst}/mlp_norm/weight", f"{src}.post_attention_layernorm.weight", d)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield from dense_rules(f"{dst}/{name}", f"{src}.self_attn.{name}", width, d, c.qkv_bias)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            yield direct(f"{dst}/{name}/weight", f"{src}.self_attn.{name}.weight", c.head_dim)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.self_attn.o_proj", d, q, c.o_bias)
        yield from dense_rules(f"{dst}/gate_proj", f"{src}.mlp.gate_proj", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/up_proj", f"{src}.mlp.up_proj", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/down_proj", f"{src}.mlp.down_proj", d, inner, c.mlp_bias)
    yield direct("language/norm/weight", f"{body}.norm.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", f"{prefix}lm_head.weight", c.vocab_size, d)


def internlm2_rules(c: DecoderConfig, prefix: str = "") -> Iterator[WeightRule]:
    """Return the rules of a decoder under InternLM2's names.

    Its ``wqkv`` holds, for each key/value head in turn, the query heads that share it, the key
    head and the value head.
    """
    d, inner, kv = c.hidden_size, c.intermediate_size, c.num_kv_heads
    shared = c.num_heads // kv
    fused = (c.num_heads + 2 * kv) * c.head_dim
    parts = (("q_proj", 0, shared), ("k_proj", shared, shared + 1),
             ("v_proj", shared + 1, shared + 2))  # fmt: skip
    yield direct("language/embedding", f"{prefix}model.tok_embeddings.weight", c.vocab_size, d)
    for i in range(c.num_layers):
        dst, src = f"language/layers/{i}", f"{prefix}model.layers.{i}"
        yield direct(f"{dst}/attn_norm/weight", f"{src}.attention_norm.weight", d)
        yield direct(f"{dst}/mlp_norm/weight", f"{src}.ffn_norm.weight", d)
        for name, start, stop in parts:
            rows, width = Rows(start, stop, shared + 2, kv), (stop - start) * kv * c.head_dim
            for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
                if leaf == "kernel" or c.qkv_bias:
                    yield WeightRule(
                        f"{dst}/{name}/{leaf}",
                        f"{src}.attention.wqkv.{hf}",
                        (width, *tail),
                        (fused, *tail),
                        rows,
                    )
        q = c.num_heads * c.head_dim
        yield from dense_rules(f"{dst}/o_proj", f"{src}.attention.wo", d, q, c.o_bias)
        for name, hf in (("gate_proj", "w1"), ("up_proj", "w3")):
            yield from dense_rules(f"{dst}/{name}", f"{src}.feed_forward.{hf}", inner, d, False)
        yield from dense_rules(f"{dst}/down_proj", f"{src}.feed_forward.w2", d, inner, False)
    yield direct("language/norm/weight", f"{prefix}model.norm.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", f"{prefix}output.weight", c.vocab_size, d)
