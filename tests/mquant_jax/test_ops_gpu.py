"""GPU kernels against NumPy (in interpret mode without a GPU), their selection, and the storage of
weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processing import reference_batch
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.stack import Runner, stack_layers
from mquant_jax.numerics import QTensor, QWeight, pack_int4, quantize_dynamic
from mquant_jax.ops import (
    attention,
    blocks_gpu,
    flash_gpu,
    gpu,
    pallas_gpu,
    xla,
)
from mquant_jax.ops.dense import held, quantized_dot, reads_stacks
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.presets import PRESETS
from mquant_jax.recipe import Section
from mquant_jax.target import Target, tracing_for
from tests.helpers import form_of, golden, interpreting, on_cpu, random_quantised, relative

INTERPRET = jax.default_backend() != "gpu"
EXACT = 1e-6  # relative: integers are exact, the scales are float32
SMALL = pallas_gpu.Blocks(64, 16, 32, 4, 2, 3)


def operands(rows: int, k: int, out: int, layers: int = 1, seed: int = 0):
    """NumPy arrays: int8 rows, int4 weights that include both extremes, float32 scales."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (rows, k)).astype(np.int8)
    w = rng.integers(-8, 8, (layers, out, k)).astype(np.int8)
    w[:, 0], w[:, -1] = -8, 7
    x_scale = rng.uniform(0.01, 2, (rows, 1)).astype(np.float32)
    return x, w, x_scale, rng.uniform(0.01, 2, (layers, out, 1)).astype(np.float32)


def product(x, w) -> np.ndarray:
    return x.astype(np.int64) @ w.astype(np.int64).T


@pytest.mark.parametrize(
    ("rows", "k", "out", "layer", "shared", "ends"),
    [
        (1, 64, 64, None, True, ()),
        (5, 7, 3, None, False, ("bias",)),
        (33, 101, 70, 1, False, ("bias", "gate", "residual")),
        (16, 192, 130, 0, True, ("residual",)),
        (20, 128, 64, 2, False, ("gate",)),
    ],
)
def test_matmul(rows, k, out, layer, shared, ends) -> None:
    x, w, x_scale, w_scale = operands(rows, k, out, 3)
    x_scale = x_scale[0, 0] if shared else x_scale
    rng = np.random.default_rng(1)
    shapes = {"bias": (out,), "gate": (rows, out), "residual": (rows, out)}
    end = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in ends}
    at = layer or 0
    expected = product(x, w[at]) * np.float64(x_scale) * w_scale[at, :, 0].astype(np.float64)
    expected = expected + end.get("bias", 0)
    if "gate" in end:
        expected *= end["gate"] / (1 + np.exp(-end["gate"].astype(np.float64)))
    expected = expected + end.get("residual", 0)
    packed = pack_int4(w)
    if layer is None:
        packed, w_scale = packed[0], w_scale[0]
    x, packed, x_scale, w_scale = map(jnp.asarray, (x, packed, x_scale, w_scale))
    got = pallas_gpu.matmul(
        QTensor(x, x_scale), packed, w_scale, SMALL, Epilogue(**end),
        layer=None if layer is None else jnp.int32(layer), interpret=INTERPRET,
    )  # fmt: skip
    assert got.dtype == jnp.float32 and relative(got, expected) < EXACT


@pytest.mark.parametrize(("rows", "k", "out", "splits"), [(1, 64, 64, 1), (3, 301, 70, 4)])
def test_partial_sums(rows, k, out, splits) -> None:
    x, w, _, _ = operands(rows, k, out, 2)
    blocks = dataclasses.replace(SMALL, splits=splits)
    got = pallas_gpu.partial_sums(
        jnp.asarray(x), jnp.asarray(pack_int4(w)), blocks, layer=jnp.int32(1), interpret=INTERPRET
    )
    assert got.shape == (splits, rows, out)
    np.testing.assert_array_equal(got.sum(0), product(x, w[1]))


def test_the_longest_sums() -> None:
    k = 2**17 - 1
    x, w = np.full((1, k), -128, np.int8), np.full((1, k), -8, np.int8)
    blocks = pallas_gpu.Blocks(64, 16, 4096, 4, 2, 1)
    got = pallas_gpu.partial_sums(
        jnp.asarray(x), jnp.asarray(pack_int4(w)), blocks, interpret=INTERPRET
    )
    np.testing.assert_array_equal(got[0], k * 128 * 8)
    assert gpu.refuses(4, 1, k, k, Target.named("gpu")) is None
    assert "too large" in gpu.refuses(4, 1, k + 1, k + 1, Target.named("gpu"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 18])
def test_the_door(rows, bias) -> None:
    """Both kernels through ``quantized_dot``: leading axes, epilogues, dtypes."""
    k, out = 40, 24
    x, w, x_scale, w_scale = operands(rows, k, out)
    q = QTensor(jnp.asarray(x).reshape(2, -1, k), jnp.asarray(x_scale).reshape(2, -1, 1))
    weight = QWeight(jnp.asarray(w[0]), jnp.asarray(w_scale[0]), k, 4, "int8")
    rng = np.random.default_rng(0)
    gate, residual = (jnp.asarray(rng.normal(size=(2, rows // 2, out)), jnp.float32),) * 2
    shift = jnp.asarray(rng.normal(size=out), jnp.float32) if bias else None
    end = Epilogue(shift, residual, gate)
    with on_cpu():
        expected = quantized_dot(q, weight, end)
    with interpreting("gpu"):
        assert held(weight).storage == "packed" and held(weight.native()).storage == "packed"
        got = quantized_dot(q, held(weight), end)
        half = quantized_dot(q, held(weight), Epilogue(shift, dtype=jnp.bfloat16))
        text = str(jax.make_jaxpr(quantized_dot)(q, held(weight)))
    assert got.shape == (2, rows // 2, out) and relative(got, expected) < EXACT
    assert half.dtype == jnp.bfloat16 and "pallas_call" in text and "dot_general" in text


@pytest.mark.parametrize(("rows", "k"), [(3, 7), (3, 64), (1, 7)])
def test_forms_of_packed_weights(rows, k) -> None:
    """XLA's implementations for packed weights, which are not unpacked in memory."""
    x, w, x_scale, w_scale = operands(rows, k, 5)
    weight = QWeight(jnp.asarray(pack_int4(w[0])), jnp.asarray(w_scale[0]), k, 4, "packed")
    q = QTensor(jnp.asarray(x), jnp.asarray(x_scale))
    expected = product(x, w[0]) * x_scale.astype(np.float64) * w_scale[0, :, 0].astype(np.float64)
    assert relative(xla.packed_int_dot(q, weight), expected) < EXACT
    assert relative(xla.packed_weight_only_dot(q.dequantize(), weight), expected) < EXACT
    with tracing_for("gpu"):
        assert relative(quantized_dot(q.dequantize(), weight), expected) < EXACT
        text = str(jax.make_jaxpr(quantized_dot)(q.dequantize(), weight))
    assert f"i4[5,{-(-k // 2)},2]" in text and "concatenate" not in text


def test_what_stays_with_xla() -> None:
    x, w, x_scale, w_scale = operands(3, 64, 5)
    q = QTensor(jnp.asarray(x), jnp.asarray(x_scale))
    weight = QWeight(jnp.asarray(w[0]), jnp.asarray(w_scale[0]), 64, 4, "int8")
    with on_cpu():
        expected = quantized_dot(q, weight)
    grouped = dataclasses.replace(weight, scale=jnp.repeat(weight.scale, 4, 1))
    with tracing_for("gpu"):
        assert held(grouped).storage == "int4" and not reads_stacks(held(grouped))
        assert relative(quantized_dot(q, held(grouped)), expected) < EXACT
        assert relative(quantized_dot(q, weight.native()), expected) < EXACT  # other storage
    old = dataclasses.replace(Target.named("gpu"), capability=7)  # too old, or not NVIDIA's
    with tracing_for(old):
        assert form_of(3, held(weight)) == "packed_int_dot" and not reads_stacks(held(weight))
        assert relative(quantized_dot(q, held(weight)), expected) < EXACT


class Block(nnx.Module):
    """A dense layer with dynamic scales and a residual connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = Dense(32, 32, section=Section(4, None, "static"), rngs=rngs)

    def __call__(self, x: jax.Array, context) -> jax.Array:
        return self.dense(quantize_dynamic(x), x)


def test_layers_are_read_in_their_stack() -> None:
    stack = stack_layers(Block, 3, nnx.Rngs(0))
    _, w, _, w_scale = operands(1, 32, 32, 3)
    packed = QWeight(jnp.asarray(pack_int4(w)), jnp.asarray(w_scale) / 32, 32, 4, "packed")
    stack.dense.kernel.set_value(packed)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 32)), jnp.float32)
    run = Runner().layers
    with on_cpu():
        expected = run("layers", stack, x, None)
        text = str(jax.make_jaxpr(lambda x: run("layers", stack, x, None))(x))
    assert "u8[32,16]" in text
    with interpreting("gpu"):
        assert reads_stacks(packed)
        got = run("layers", stack, x, None)
        text = str(jax.make_jaxpr(lambda x: run("layers", stack, x, None))(x))
    assert relative(got, expected) < 1e-5
    assert "u8[3,32,16]" in text and "u8[32,16]" not in text


def test_a_decode_step() -> None:
    """A decode step of a whole decoder, traced for GPU, agrees with the CPU's."""
    hf, inputs, _ = golden("qwen2_vl", "public")
    config = Qwen2VLConfig.from_hf(hf)
    batch = reference_batch(config, inputs)
    rows, length = batch.input_ids.shape
    with on_cpu():
        model = random_quantised(config, PRESETS["w4a8"])
        cache = jax.jit(lambda m, b: m.prefill(b, m.language.init_cache(rows, length + 2)))(
            model, batch
        )[1]
    ids, at = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), length, jnp.int32)

    def step():
        def fresh(model, cache):  # traces are cached by function, not by platform
            return model.decode(ids, at, at, cache)[0]

        text = str(jax.make_jaxpr(fresh)(model, cache))
        return jax.jit(fresh)(model, cache), text.count("pallas_call[")

    with on_cpu():
        expected, kernels = step()
    assert kernels == 0
    with interpreting("gpu"), jax.default_matmul_precision("highest"):  # no TF32
        got, kernels = step()
    assert kernels == 7 and relative(got, expected) < 1e-4


def test_of_layer() -> None:
    _, w, _, w_scale = operands(1, 8, 3, 2)
    stacked = QWeight(jnp.asarray(w), jnp.asarray(w_scale), 8, 4, "int8", jnp.int32(1))
    alone = stacked.of_layer()
    np.testing.assert_array_equal(alone.values, w[1])
    np.testing.assert_array_equal(alone.scale, w_scale[1])
    assert alone.layer is None and alone.of_layer() is alone


def test_the_table() -> None:
    """Every entry fits the limits of all supported GPUs."""
    table = gpu.table()
    assert "No device" in table["origin"] or "Timed on" in table["origin"]
    for entry in [*table["shapes"], *table["classes"]]:
        assert entry["path"] in (*gpu.PATHS, gpu.XLA)
        if entry["path"] == gpu.XLA:
            continue
        blocks = pallas_gpu.Blocks(*entry["blocks"])
        sizes = blocks.out, blocks.rows, blocks.depth, blocks.warps
        assert all(n & (n - 1) == 0 for n in sizes) and blocks.rows >= 16 and blocks.depth >= 32
        assert entry.get("spills", 0) == 0 and entry.get("shared", 0) <= 99 * 1024
    assert gpu.choose(1, 3584, 3584).path == "pallas_gpu_gemv"
    assert gpu.choose(1000, 3584, 18944) == gpu.choose(1024, 3584, 18944)
    assert gpu.choose(513, 11, 13).path == gpu.choose(10**5, 10**5, 64).path == "pallas_gpu"


@pytest.mark.parametrize(
    ("shape", "in_order"),
    [((1, 4, 2, 130, 130, 80), True), ((2, 2, 1, 64, 200, 24), False)],
)
def test_attention(shape, in_order) -> None:
    b, heads, kv, t, s, d = shape
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((b, heads, t, d), (b, kv, d, s), (b, kv, s, d))
    )
    keys = np.tile(np.arange(s), (b, 1)) if in_order else rng.permuted(
        np.tile(np.arange(s), (b, 1)), axis=1
    )  # fmt: skip
    keys[:, 1 + np.flatnonzero(rng.random(s - 1) < 0.3)] = NEVER
    top = np.arange(t) if in_order else rng.integers(s // 4, s, (b, t))
    top = np.broadcast_to(top, (b, t)).astype(np.int32).copy()
    top[:, 5] = -1
    seen = Visibility(jnp.asarray(top), jnp.asarray(keys, jnp.int32), after=0 if in_order else None)
    with on_cpu():
        exact = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)), seen)
    got = np.array(flash_gpu.attend(q, k, v, seen, interpret=INTERPRET), float)
    assert got.shape == (b, t, heads * d) and np.isfinite(got).all()
    got[:, 5] = 0
    assert relative(got, np.asarray(exact).copy() * (np.arange(t) != 5)[:, None]) < 0.01


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 2, 200, 48), (1, 2, 2, 64, 16), (3, 32, 1, 150, 80)])
def test_attention_to_a_cache(shape, narrow) -> None:
    """One query per prompt attends to some slots of a middle layer."""
    b, heads, kv, s, d = shape
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((b, heads, 1, d), (3, b, kv, d, s), (3, b, kv, s, d))
    )
    held = (rng.random((b, s)) < 0.5) & (np.arange(s) < s // 2 + 10)
    held[..., 0] = True
    held[-1] &= np.arange(s) < 1 if b > 1 else True
    seen = Visibility.of_keys(jnp.asarray(held), 1)
    without = Visibility.of_keys(jnp.asarray(held & (np.arange(b) > 0)[:, None]), 1)
    cache = (quantize_dynamic(k, axis=-2), quantize_dynamic(v)) if narrow else (k, v)
    float32 = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else x.astype(jnp.float32), cache)

    def run(q, cache, seen):
        return attention.attend_cache(q, cache, jnp.int32(1), seen)

    with on_cpu():
        exact = run(q.astype(jnp.float32), float32, seen)
    with interpreting("gpu"):
        got = run(q, cache, seen)
        unseen = run(q, cache, without)
        text = str(jax.make_jaxpr(lambda *args: run(*args))(q, cache, seen))
    assert got.shape == (b, 1, heads * d) and got.dtype == jnp.bfloat16
    assert relative(got, exact) < 0.01
    assert np.isfinite(np.asarray(unseen, np.float32)).all()
    np.testing.assert_array_equal(unseen[1:], got[1:])
    # The kernel takes the whole stack.
    assert text.count("pallas_call[") == 1 and "dynamic_slice" not in text


def test_parts() -> None:
    assert blocks_gpu.parts(128) == [(0, 128)]
    assert blocks_gpu.parts(112) == [(0, 64), (64, 32), (96, 16)]


def test_the_chosen_attention() -> None:
    def heads(t: int, d: int = 16, dtype=jnp.bfloat16):
        rng = np.random.default_rng(0)
        shapes = (1, 2, t, d), (1, 1, d, t), (1, 1, t, d)
        return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]

    def decoding(q, v, prefix=None) -> str:
        return attention.CACHE.choose(attention.Heads.of(q, v, prefix)).name

    def kernel(*args) -> bool:
        def fresh(*args):  # traces are cached by function, not by platform
            return attention.attend(*args)

        return "pallas_call" in str(jax.make_jaxpr(fresh)(*args))

    seen = Visibility.of_keys(jnp.ones((1, 64), bool), 64)
    single = Visibility.of_keys(jnp.ones((1, 1), bool), 1)
    with on_cpu():
        plain = attention.attend(*heads(64), seen)
        assert not kernel(*heads(64), seen)
    prefix = jnp.zeros((1, 3, 16), jnp.bfloat16)
    q, k, v = heads(64)
    cached = [quantize_dynamic(k, axis=-2), quantize_dynamic(v)]
    with interpreting("gpu"):
        assert kernel(*heads(64), seen)
        assert not kernel(*heads(1), single)
        assert not kernel(*heads(64, 256), seen)
        assert not kernel(*heads(64, dtype=jnp.float32), seen)
        assert not kernel(q, k, v, seen, (prefix, prefix)) and not kernel(q, *cached, seen)
        got = attention.attend(*heads(64), seen)
        assert decoding(heads(1)[0], v) == "decode_gpu"
        assert decoding(heads(1)[0], v, (prefix, prefix)) == "whole_layer"
        for other in (heads(2), heads(1, 24), heads(1, 256), heads(1, dtype=jnp.float32)):
            assert decoding(other[0], other[2]) == "whole_layer"
        vast = jax.ShapeDtypeStruct((28, 32, 4, 8192, 128), jnp.int8)
        assert decoding(heads(1)[0], QTensor(vast, prefix)) == "whole_layer"
    assert relative(got, plain) < 0.01


def test_device() -> None:
    for capability, fits in ((9, True), (8, True), (7, False), (None, False)):
        target = dataclasses.replace(Target.named("gpu"), capability=capability)
        assert target.kernels_for_gpu is fits
    assert not Target.named("tpu").kernels_for_gpu
