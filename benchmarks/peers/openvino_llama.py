"""OpenVINO: the decoder written in its own operations, with the cache as the model's state.

The graph has the form that exporters produce and the CPU plugin can fuse: RMS norms, rotary
embeddings, attention with its cache. ``openvino-f32`` computes in float32 throughout. The others
have weights compressed by NNCF (``int8``: its default mode; ``int4``: symmetric, groups of 64,
embedding and head int8) and use the plugin's own defaults, which quantise activations at run time
on processors where that is faster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from benchmarks.peers.base import Peer, Source, TokenByToken
from mquant_jax.nn.params import Params

GROUP = 64  # divides 576 and 1536


def graph(cfg, params: Params) -> ov.Model:
    """Build the graph: ``tokens`` and ``positions``, int64 ``[1, T]``, and ``beam`` -> logits of
    the last token, ``[1, 1, vocab]``."""
    tokens = ops.parameter([1, -1], np.int64, name="tokens")
    positions = ops.parameter([1, -1], np.int64, name="positions")
    beam = ops.parameter([-1], np.int32, name="beam")  # the fusion expects a beam index
    for node in (tokens, positions, beam):
        node.output(0).set_names({node.get_friendly_name()})
    table = ops.constant(params["language/embedding"])
    x = ops.gather(table, tokens, np.int64(0))
    context = (*_angles(cfg, positions), _mask(positions), beam)
    sinks = []
    for i in range(cfg.num_layers):
        layer = {
            leaf: params[f"language/layers/{i}/{leaf}"]
            for leaf in ("attn_norm/weight", "mlp_norm/weight")
        } | {
            f"{n}_proj": params[f"language/layers/{i}/{n}_proj/kernel"]
            for n in ("q", "k", "v", "o", "gate", "up", "down")
        }
        h, states = _attention(cfg, layer, _norm(cfg, x, layer["attn_norm/weight"]), context, i)
        sinks += states
        x = ops.add(x, h)
        h = _norm(cfg, x, layer["mlp_norm/weight"])
        gate = ops.swish(_dense(h, layer["gate_proj"]))
        x = ops.add(x, _dense(ops.multiply(gate, _dense(h, layer["up_proj"])), layer["down_proj"]))
    last = ops.gather(x, np.int64([-1]), np.int64(1))
    h = _norm(cfg, last, params["language/norm/weight"])
    logits = ops.matmul(h, table, False, True)
    return ov.Model([ops.result(logits)], sinks, [tokens, positions, beam], "llama")


def _dense(x, kernel: np.ndarray):
    return ops.matmul(x, ops.constant(kernel), False, True)


def _norm(cfg, x, weight: np.ndarray):
    mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.int64([-1]), True)
    root = ops.sqrt(ops.add(mean, np.float32(cfg.norm_eps)))
    return ops.multiply(
        ops.constant(weight.reshape(1, 1, -1)), ops.multiply(x, ops.divide(np.float32(1), root))
    )


def _angles(cfg, positions):
    """Return cosine and sine, ``[1, 1, T, head_dim]``."""
    slots = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim
    rates = (cfg.rope_theta**-slots).astype(np.float32).reshape(1, 1, -1)
    at = ops.convert(ops.unsqueeze(positions, np.int64(-1)), "f32")
    half = ops.multiply(at, ops.constant(rates))
    both = ops.unsqueeze(ops.concat([half, half], -1), np.int64(1))
    return ops.cos(both), ops.sin(both)


def _mask(positions):
    """Return whether a token sees a key: bool ``[1, 1, T, S]``."""
    count = ops.add(ops.reduce_max(positions, np.int64([0, 1]), False), np.int64(1))
    keys = ops.range(np.int64(0), count, np.int64(1), "i64")
    keys = ops.reshape(keys, np.int64([1, 1, 1, -1]), False)
    return ops.less_equal(keys, ops.reshape(positions, np.int64([1, 1, -1, 1]), False))


def _heads(y, count: int, head_dim: int):
    """Split ``[1, T, heads * d]`` into ``[1, heads, T, d]``."""
    split = ops.reshape(y, np.int64([0, 0, count, head_dim]), True)
    return ops.transpose(split, np.int64([0, 2, 1, 3]))


def _turned(x, cos, sin, head_dim: int):
    """Apply rotary embeddings to ``[1, heads, T, d]``."""
    first, second = ops.variadic_split(x, np.int64(3), np.int64([head_dim // 2, -1])).outputs()
    across = ops.concat([ops.multiply(second, np.float32(-1)), first], -1)
    return ops.add(ops.multiply(x, cos), ops.multiply(across, sin))


def _attention(cfg, layer: Params, x, context, index: int):
    """Return the attention with its cache, and the operations that store the cache."""
    cos, sin, mask, beam = context
    d, kv = cfg.head_dim, cfg.num_kv_heads
    q = _turned(_heads(_dense(x, layer["q_proj"]), cfg.num_heads, d), cos, sin, d)
    k = _turned(_heads(_dense(x, layer["k_proj"]), kv, d), cos, sin, d)
    v = _heads(_dense(x, layer["v_proj"]), kv, d)
    nothing = ops.constant(np.zeros((1, kv, 0, d), np.float32))
    sinks, full = [], []
    for kind, new in (("k", k), ("v", v)):
        name = f"{kind}{index}"
        past = ops.read_value(nothing, name, ov.Type.f32, ov.PartialShape([-1, kv, -1, d]))
        now = ops.concat([ops.gather(past, beam, np.int64(0)), new], 2)
        sinks.append(ops.assign(now, name))
        shared = ops.broadcast(
            ops.unsqueeze(now, np.int64(2)),
            np.int64([1, 1, cfg.num_heads // kv, 1, 1]),
            broadcast_spec="BIDIRECTIONAL",
        )
        full.append(ops.reshape(shared, np.int64([0, cfg.num_heads, -1, d]), True))
    out = ops.scaled_dot_product_attention(q, full[0], full[1], mask)
    joined = ops.reshape(
        ops.transpose(out, np.int64([0, 2, 1, 3])), np.int64([0, 0, cfg.num_heads * d]), True
    )
    return _dense(joined, layer["o_proj"]), sinks


class OpenVINO(TokenByToken):
    """One compiled model and its state."""

    def __init__(self, source: Source, model: ov.Model, **properties: str):
        super().__init__()
        constants = [n for n in model.get_ops() if n.get_type_name() == "Constant"]
        self.weight_bytes = sum(n.get_byte_size() for n in constants)
        properties |= {"INFERENCE_NUM_THREADS": str(source.threads)}
        self.compiled = ov.Core().compile_model(
            model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **properties}
        )
        self.request = self.compiled.create_infer_request()
        self.settings = ", ".join(
            f"{name}={self.compiled.get_property(name)}"
            for name in ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION",
                         "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        )  # fmt: skip

    def clear(self) -> None:
        self.request.reset_state()
        self.seen = 0

    def next_token(self, tokens: Sequence[int]) -> int:
        out = self.request.infer({
            "tokens": np.asarray([tokens], np.int64),
            "positions": np.arange(self.seen, self.seen + len(tokens))[None],
            "beam": np.zeros(1, np.int32),
        })  # fmt: skip
        self.seen += len(tokens)
        return int(out[0][0, -1].argmax())


def build(source: Source, names: Sequence[str]) -> Iterator[tuple[str, Peer]]:
    import nncf  # imported late: it loads several hundred modules

    nncf.set_log_level(logging.ERROR)
    modes = {
        "openvino-int8": {},
        "openvino-int4": {
            "mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP, "ratio": 1.0,
        },
    }  # fmt: skip
    for name in names:
        model = graph(source.config.language, source.params)
        if name in modes:
            yield name, OpenVINO(source, nncf.compress_weights(model, **modes[name]))
        else:
            yield name, OpenVINO(source, model, EXECUTION_MODE_HINT="ACCURACY")
