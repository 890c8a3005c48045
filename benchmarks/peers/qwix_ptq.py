"""Qwix: its post-training quantisation of a plain Llama in Flax.

Our own decoder scans over stacked layers and uses its own matrix products, but Qwix finds weights
by the module that holds them. This is the plainest decoder that Qwix can quantise: ``nnx.Linear``
layers one after the other, a cache of fixed length, batch 1. Weights are int4 with one scale per
output channel. Activations are int8 with one scale per token (dynamic) or a single scale (static).
The head is int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from benchmarks.peers.base import Peer, Source
from mquant_jax.nn.params import parameter_bytes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Block(nnx.Module):
    """One decoder layer on the tokens ``[T, hidden]`` of a single prompt."""

    def __init__(self, cfg, rngs: nnx.Rngs):
        self.cfg = cfg
        q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        hidden, inner = cfg.hidden_size, cfg.intermediate_size
        shapes = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden),
                  (hidden, inner), (hidden, inner), (inner, hidden))  # fmt: skip
        for name, (rows, columns) in zip(PROJECTIONS, shapes, strict=True):
            setattr(self, name, nnx.Linear(rows, columns, use_bias=False, rngs=rngs))
        self.attn_norm = nnx.RMSNorm(hidden, epsilon=cfg.norm_eps, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(hidden, epsilon=cfg.norm_eps, rngs=rngs)

    def __call__(self, x, angles, mask, cache, at):
        cfg, t = self.cfg, x.shape[0]
        h = self.attn_norm(x)
        q = turned(self.q_proj(h).reshape(t, cfg.num_heads, cfg.head_dim), angles)
        k = turned(self.k_proj(h).reshape(t, cfg.num_kv_heads, cfg.head_dim), angles)
        v = self.v_proj(h).reshape(t, cfg.num_kv_heads, cfg.head_dim)
        k, v = (
            jax.lax.dynamic_update_slice(old, new, (at, 0, 0))
            for old, new in zip(cache, (k, v), strict=True)
        )
        out = jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask)
        x = x + self.o_proj(out.reshape(t, -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h)), (k, v)


def turned(x, angles):
    """Apply rotary embeddings, ``angles [T, 1, d / 2]``, to ``[T, heads, d]``."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Llama(nnx.Module):
    """Map int32 ``[T]`` at position ``at`` to logits ``[vocab]`` of the last token, and the
    cache."""

    def __init__(self, cfg, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = nnx.Embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(cfg, rngs) for _ in range(cfg.num_layers)])
        self.norm = nnx.RMSNorm(cfg.hidden_size, epsilon=cfg.norm_eps, rngs=rngs)
        self.head = nnx.Linear(cfg.hidden_size, cfg.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens, at, cache):
        cfg = self.cfg
        order = at + jnp.arange(tokens.shape[0])
        slots = jnp.arange(0, cfg.head_dim, 2) / cfg.head_dim
        angles = order[:, None, None] * cfg.rope_theta**-slots
        mask = jnp.arange(cache[0][0].shape[0]) <= order[:, None]
        x, out = self.embedding(tokens), []
        for layer, kept in zip(self.layers, cache, strict=True):
            x, kept = layer(x, angles, mask[None, None], kept, at)
            out.append(kept)
        return self.head(self.norm(x[-1:]))[0], out


def plain(source: Source) -> Llama:
    """Build the float32 model."""
    cfg, params = source.config.language, source.params
    model = nnx.eval_shape(lambda: Llama(cfg, nnx.Rngs(0)))
    table = jnp.asarray(params["language/embedding"])
    model.embedding.embedding.set_value(table)
    model.head.kernel.set_value(table.T)
    model.norm.scale.set_value(jnp.asarray(params["language/norm/weight"]))
    for i, layer in enumerate(model.layers):
        prefix = f"language/layers/{i}"
        for name in PROJECTIONS:
            kernel = jnp.asarray(params[f"{prefix}/{name}/kernel"])
            getattr(layer, name).kernel.set_value(kernel.T)
        for name in ("attn_norm", "mlp_norm"):
            getattr(layer, name).scale.set_value(jnp.asarray(params[f"{prefix}/{name}/weight"]))
    return model


def empty_cache(cfg, slots: int):
    """Return zero keys and values for every layer."""
    shape = (slots, cfg.num_kv_heads, cfg.head_dim)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(cfg.num_layers)]


def quantised(source: Source, static: bool) -> Llama:
    """Quantise the model with Qwix; static scales come from one calibration window."""
    scales = {"act_qtype": jnp.int8, "act_static_scale": static}
    rules = [
        qwix.QuantizationRule(module_path="head", weight_qtype=jnp.int8, **scales),
        qwix.QuantizationRule(
            module_path=f"layers/.*/({'|'.join(PROJECTIONS)})", weight_qtype=jnp.int4, **scales
        ),
    ]
    tokens = jnp.asarray(source.calibration.input_ids[0])
    cache = empty_cache(source.config.language, tokens.shape[0])
    return qwix.quantize_model(plain(source), qwix.PtqProvider(rules), tokens, jnp.int32(0), cache)


class Qwix:
    """The quantised model with compiled prefill and decode loop."""

    def __init__(self, source: Source, model: Llama, settings: str):
        self.graphdef, self.params = nnx.split(model)
        self.cfg, self.slots, self.limit = source.config.language, source.room, source.new_tokens
        self.start = jax.jit(self._start)
        self.run = jax.jit(self._run, donate_argnames="cache")
        self.weight_bytes, self.settings = parameter_bytes(self.params), settings

    def _start(self, params, tokens):
        model = nnx.merge(self.graphdef, params)
        logits, cache = model(tokens, jnp.int32(0), empty_cache(self.cfg, self.slots))
        return jnp.zeros(self.limit + 1, jnp.int32).at[0].set(logits.argmax()), cache

    def _run(self, params, tokens, cache, at, n):
        model = nnx.merge(self.graphdef, params)

        def step(i, carry):
            tokens, cache = carry
            last = jax.lax.dynamic_slice_in_dim(tokens, i, 1)
            logits, cache = model(last, at + i, cache)
            return tokens.at[i + 1].set(logits.argmax()), cache

        return jax.lax.fori_loop(0, n, step, (tokens, cache))

    def prefill(self, tokens: Sequence[int]) -> None:
        self.at = len(tokens)
        ids = jnp.asarray(tokens, jnp.int32)
        self.state = jax.block_until_ready(self.start(self.params, ids))

    def decode(self, n: int) -> list[int]:
        tokens, cache = self.state
        self.state = self.run(self.params, tokens, cache=cache, at=self.at, n=n)
        return np.asarray(self.state[0])[: n + 1].tolist()


def build(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    for name in names:
        static = name.endswith("static")
        scale = "one static scale per layer" if static else "a dynamic scale per token"
        yield name, Qwix(source, quantised(source, static), f"int4 weights, {scale}, int8 head")
