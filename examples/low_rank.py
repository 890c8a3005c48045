"""A Llama with low-rank updates, as a function of few trainable tensors.

It answers many short questions about one picture in one pass: the picture's tokens are computed
once, and each question sees them and itself, as if it had been asked alone. Matrices are multiplied
in bfloat16 and summed in float32: on CPUs with AVX512-BF16 that doubles the speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PREFIX = "language_model.model."
MATRICES = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}  # fmt: skip
UPDATED = ("q_proj", "v_proj", "o_proj", "down_proj")  # thin products are slow on CPUs
_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the tensors' shapes do not say."""

    heads: int
    kv_heads: int
    layers: int
    theta: float
    eps: float


def shape_of(text_config: Mapping[str, Any]) -> Shape:
    """The shape of a config.json's language model."""
    c = text_config
    return Shape(
        c["num_attention_heads"], c["num_key_value_heads"], c["num_hidden_layers"],
        c["rope_theta"], c["rms_norm_eps"],
    )  # fmt: skip


def frozen_language(tensors: Mapping[str, np.ndarray], shape: Shape) -> Tree:
    """Stack a checkpoint's layers: matrices bfloat16 ``[layers, out, in]``, norms float32."""

    def stack(name: str, dtype) -> jax.Array:
        rows = [tensors[f"{PREFIX}layers.{i}.{name}.weight"] for i in range(shape.layers)]
        return jnp.asarray(np.stack(rows), dtype)

    layers = {k: stack(v, jnp.bfloat16) for k, v in MATRICES.items()}
    layers |= {k: stack(v, jnp.float32) for k, v in _NORMS.items()}
    return {
        "layers": layers,
        "embedding": jnp.asarray(tensors[f"{PREFIX}embed_tokens.weight"], jnp.bfloat16),
        "norm": jnp.asarray(tensors[f"{PREFIX}norm.weight"], jnp.float32),
    }


def fresh_updates(frozen: Tree, rank: int, seed: int) -> Tree:
    """Return factors whose product is 0: ``down`` ``[layers, rank, in]``, ``up`` ``[layers, out,
    rank]``."""
    rng, out = np.random.default_rng(seed), {}
    for name in UPDATED:
        layers, rows, columns = frozen["layers"][name].shape
        down = rng.standard_normal((layers, rank, columns)) / np.sqrt(columns)
        out[name] = {
            "down": jnp.asarray(down, jnp.float32),
            "up": jnp.zeros((layers, rows, rank), jnp.float32),
        }
    return out


def named_updates(updates: Tree) -> dict[str, np.ndarray]:
    """Return the factors under the names that benchmarks/llava_folder.py merges."""
    return {
        f"{PREFIX}layers.{i}.{MATRICES[name]}.weight.{factor}": np.asarray(value[i])
        for name, factors in updates.items()
        for factor, value in factors.items()
        for i in range(len(value))
    }


def _product(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Contract one axis of each: bfloat16 factors, float32 sum."""
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(
        x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel.T`` for ``[..., in]`` and ``[out, in]``; its gradients multiply in bfloat16
    too."""
    return _product(x, kernel, (x.ndim - 1, 1))


def _times_forward(x, kernel):
    return times(x, kernel), (x.astype(jnp.bfloat16), kernel)


def _times_backward(saved, g):
    x, kernel = saved
    flat_g, flat_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    change = _product(flat_g, flat_x, (0, 0)).astype(kernel.dtype)
    return _product(g, kernel, (g.ndim - 1, 0)), change


times.defvjp(_times_forward, _times_backward)


def project(frozen: jax.Array, update: Mapping[str, jax.Array] | None, x: jax.Array) -> jax.Array:
    """One matrix with its low-rank update, if it has one."""
    y = times(x, frozen)
    return y if update is None else y + times(times(x, update["down"]), update["up"])


def _rms(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def _rotate(x: jax.Array, first: int, theta: float) -> jax.Array:
    """Rotary positions from ``first`` on, of ``x`` ``[..., T, heads, d]``."""
    half = x.shape[-1] // 2
    angles = jnp.outer(first + jnp.arange(x.shape[-3]), theta ** (-jnp.arange(half) / half))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(shape: Shape, q, k, v, shared_k=None, shared_v=None) -> jax.Array:
    """Causal attention of ``[B, Q, T, heads, d]``, which also sees ``[B, P, kv heads, d]``."""
    b, n, t, _, d = q.shape
    q = q.reshape(b, n, t, shape.kv_heads, -1, d) * d**-0.5
    scores = jnp.einsum("bntghd,bnsgd->bnghts", q, k)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    if shared_k is not None:
        before = jnp.einsum("bntghd,bpgd->bnghtp", q, shared_k)
        scores = jnp.concatenate([before, scores], -1)
    share = jax.nn.softmax(scores, -1)
    out = jnp.einsum("bnghts,bnsgd->bntghd", share[..., -t:], v)
    if shared_v is not None:
        out += jnp.einsum("bnghtp,bpgd->bntghd", share[..., :-t], shared_v)
    return out.reshape(b, n, t, -1)


def stream(shape: Shape, frozen: Tree, updates: Tree, front: jax.Array, ids: jax.Array):
    """Run the layers.

    Args:
        front: embeddings ``[B, P, hidden]`` that all questions of a row see.
        ids: int32 ``[B, Q, T]``, questions and answers, padded on the right.

    Returns:
        The stream after the last layer at the questions' tokens, float32 ``[B, Q, T, hidden]``.
    """
    b, n, t = ids.shape
    p = front.shape[1]
    x = jnp.concatenate(
        [front, frozen["embedding"][ids].astype(jnp.float32).reshape(b, n * t, -1)], axis=1
    )

    def split(y: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
        """Separate fronts ``[B, 1, P, heads, d]`` and questions ``[B, Q, T, heads, d]``."""
        d = y.shape[-1] // heads
        return y[:, :p].reshape(b, 1, p, heads, d), y[:, p:].reshape(b, n, t, heads, d)

    def layer(x: jax.Array, step: tuple[Tree, Tree]):
        w, u = step

        def dense(name: str, y: jax.Array) -> jax.Array:
            return project(w[name], u.get(name), y)

        y = _rms(x, w["attn_norm"], shape.eps)
        q0, q = split(dense("q_proj", y), shape.heads)
        k0, k = split(dense("k_proj", y), shape.kv_heads)
        v0, v = split(dense("v_proj", y), shape.kv_heads)
        q0, k0 = (_rotate(z, 0, shape.theta) for z in (q0, k0))
        q, k = (_rotate(z, p, shape.theta) for z in (q, k))
        fronts = _attend(shape, q0, k0, v0).reshape(b, p, -1)
        asked = _attend(shape, q, k, v, k0[:, 0], v0[:, 0]).reshape(b, n * t, -1)
        x = x + dense("o_proj", jnp.concatenate([fronts, asked], axis=1))
        y = _rms(x, w["mlp_norm"], shape.eps)
        hidden = jax.nn.silu(dense("gate_proj", y)) * dense("up_proj", y)
        return x + dense("down_proj", hidden), None

    x, _ = jax.lax.scan(layer, x, (frozen["layers"], updates))
    return x[:, p:].reshape(b, n, t, -1)


def logits(shape: Shape, frozen: Tree, x: jax.Array) -> jax.Array:
    """The tied head on the stream: float32 ``[..., vocab]``."""
    return times(_rms(x, frozen["norm"], shape.eps), frozen["embedding"])
