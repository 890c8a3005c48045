"""What families share of their language half: published tensor names and residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from models.base import WeightRule
from models.streams import Hidden, Read, Stream, ValueOutput
from mquant_jax.nn.decoder import DecoderConfig

_L = "language/layers/*"


def direct(dst: str, src: str, *shape: int) -> WeightRule:
    """A tensor that is taken over as it is."""
    return WeightRule(dst, src, shape, shape)


def dense_rules(
    dst: str, src: str, out: int, into: int, bias: bool = True
) -> Iterator[WeightRule]:
    """Kernel ``[out, into]`` and bias ``[out]`` of a dense layer."""
    yield direct(f"{dst}/kernel", f"{src}.weight", out, into)
    if bias:
        yield direct(f"{dst}/bias", f"{src}.bias", out)


def decoder_rules(c: DecoderConfig) -> Iterator[WeightRule]:
    """The decoder under the names that Llama was published with and most others kept."""
    d, inner = c.hidden_size, c.intermediate_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield direct("language/embedding", "model.embed_tokens.weight", c.vocab_size, d)
    for i in range(c.num_layers):
        dst, src = f"language/layers/{i}", f"model.layers.{i}"
        yield direct(f"{dst}/attn_norm/weight", f"{src}.input_layernorm.weight", d)
        yield direct(f"{dst}/mlp_norm/weight", f"{src}.post_attention_layernorm.weight", d)
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield from dense_rules(f"{dst}/{name}", f"{src}.self_attn.{name}", width, d, c.qkv_bias)
        yield from dense_rules(f"{dst}/o_proj", f"{src}.self_attn.o_proj", d, q, c.o_bias)
        yield from dense_rules(f"{dst}/gate_proj", f"{src}.mlp.gate_proj", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/up_proj", f"{src}.mlp.up_proj", inner, d, c.mlp_bias)
        yield from dense_rules(f"{dst}/down_proj", f"{src}.mlp.down_proj", d, inner, c.mlp_bias)
    yield direct("language/norm/weight", "model.norm.weight", d)
    if not c.tied_head:
        yield direct("language/head/kernel", "lm_head.weight", c.vocab_size, d)


def decoder_stream(c: DecoderConfig, *writers: str) -> Stream:
    """The decoder's residual stream; ``writers`` are the layers that bring in visual tokens."""
    return Stream(
        "language",
        c.hidden_size,
        tables=("language/embedding",),
        writers=(*writers, f"{_L}/o_proj", f"{_L}/down_proj"),
        reads=(
            Read(f"{_L}/attn_norm", tuple(f"{_L}/{n}" for n in ("q_proj", "k_proj", "v_proj"))),
            Read(f"{_L}/mlp_norm", (f"{_L}/gate_proj", f"{_L}/up_proj")),
            Read("language/norm", ("language/head",)),
        ),
    )


def decoder_attention(c: DecoderConfig) -> ValueOutput:
    """Values and output projections of the decoder."""
    return ValueOutput(f"{_L}/v_proj", f"{_L}/o_proj", c.head_dim)


def decoder_hidden(c: DecoderConfig) -> Hidden:
    """The decoder's MLP behind its online rotation."""
    return Hidden(f"{_L}/down_proj", c.intermediate_size, f"{_L}/up_proj")
