"""Quantised products against NumPy integers, and the operations in traced programs."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processing import reference_batch
from mquant_jax.nn.dense import Dense
from mquant_jax.numerics import QTensor, QWeight, quantize_dynamic, quantize_weight
from mquant_jax.ops import cpu, xla
from mquant_jax.ops.dense import (
    float_dot,
    held,
    quantized_dot,
)
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.presets import PRESETS
from mquant_jax.recipe import Section
from mquant_jax.target import Target, tracing_for
from tests.helpers import (
    cpu_target,
    form_of,
    forward,
    golden,
    integer_dots,
    mostly_slow,
    random_quantised,
    relative,
)

VNNI = cpu_target(features=frozenset({"avx512_vnni"}))
few = settings(max_examples=15, deadline=None)
EXACT = 1e-6  # relative: integers are exact, the scales are float32


def operands(rows: int, out: int, groups: int, size: int, bits: int, per_token: bool, seed=0):
    """Random int8 rows, a weight, and their product in NumPy's int64 and float64."""
    rng = np.random.default_rng(seed)
    k, low, high = groups * size, -(2 ** (bits - 1)), 2 ** (bits - 1)
    x = rng.integers(-128, 128, (rows, k))
    w = rng.integers(low, high, (out, k))
    x_scale = rng.uniform(0.01, 2, (rows, 1) if per_token else ()).astype(np.float32)
    w_scale = rng.uniform(0.01, 2, (out, groups)).astype(np.float32)
    partial = np.einsum("rgs,ogs->rog", x.reshape(rows, groups, size), w.reshape(out, groups, size))
    expected = (partial * w_scale.astype(np.float64)).sum(-1) * x_scale.astype(np.float64)
    q = QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(x_scale))
    weight = QWeight(jnp.asarray(w, jnp.int8), jnp.asarray(w_scale), k, bits, "int8")
    return q, weight, expected


def close(got, expected) -> None:
    scale = np.abs(expected).max() + 1e-6
    np.testing.assert_allclose(np.asarray(got) / scale, expected / scale, atol=3e-6)


@few
@given(
    rows=st.sampled_from([1, 2, 3, 17, xla.MANY_ROWS + 3]),
    out=st.sampled_from([1, 5, 32]),
    shape=st.sampled_from([(1, 1), (1, 7), (1, 64), (3, 5), (4, 16), (6, 1)]),
    bits=st.sampled_from([4, 8]),
    per_token=st.booleans(),
    packed=st.booleans(),
)
def test_integer_forms(rows, out, shape, bits, per_token, packed) -> None:
    x, w, expected = operands(rows, out, *shape, bits, per_token)
    w = w.packed() if packed else w
    close(xla.int_dot(x, w), expected)
    close(quantized_dot(x, w), expected)
    close(xla.weight_only_dot(x.dequantize(), w), expected)


def test_long_sums_do_not_overflow() -> None:
    k = 16384
    x = QTensor(jnp.full((2, k), -128, jnp.int8), jnp.float32(1))
    w = QWeight(jnp.full((3, k), -128, jnp.int8), jnp.ones((3, 1)), k, 8, "int8")
    np.testing.assert_array_equal(xla.int_dot(x, w), np.float32(k * 128 * 128))


def test_leading_axes_and_their_scales() -> None:
    x, w, expected = operands(6, 5, 1, 7, 4, True)
    lead = QTensor(x.values.reshape(2, 3, 7), x.scale.reshape(2, 3, 1))
    close(quantized_dot(lead, w), expected.reshape(2, 3, 5))
    close(quantized_dot(lead.dequantize(), w), expected.reshape(2, 3, 5))


def test_lengths_must_agree() -> None:
    x, w, _ = operands(2, 3, 1, 8, 4, False)
    with pytest.raises(ValueError, match="input has 7 features, weight expects 8"):
        quantized_dot(QTensor(x.values[:, :7], x.scale), w)


def test_the_byte_form() -> None:
    """``byte_dot`` is exact on every CPU and traces as s8 x s8 -> s32."""
    rng = np.random.default_rng(0)
    for rows, k, out in ((1, 1, 1), (1, 7, 3), (5, 64, 33), (70, 300, 130), (2, 16384, 3)):
        x = jnp.asarray(rng.integers(-128, 128, (rows, k)), jnp.int8)
        w = jnp.asarray(rng.integers(-128, 128, (out, k)), jnp.int8)
        np.testing.assert_array_equal(cpu.byte_dot(x, w), xla.s8_dot(x, w))
    low = jnp.full((2, 16384), -128, jnp.int8)
    np.testing.assert_array_equal(cpu.byte_dot(low, low), 16384 * 128 * 128)
    assert integer_dots(cpu.byte_dot, x, w).dots == [("int8", "int8", "int32")]
    with tracing_for(VNNI):
        for rows, groups in ((3, 1), (xla.MANY_ROWS, 4)):
            q, weight, expected = operands(rows, 6, groups, 20, 4, True)
            assert form_of(rows, weight) == "byte_dot"
            close(quantized_dot(q, weight), expected)
        assert form_of(1, operands(1, 6, 4, 20, 4, True)[1]) == "padded_int_dot"
    amx = dataclasses.replace(VNNI, features=VNNI.features | {"amx_int8"})
    for other in (amx, dataclasses.replace(VNNI, jax_version=(0, 11))):
        with tracing_for(other):
            assert form_of(3, operands(3, 6, 1, 20, 4, True)[1]) == "int_dot"


def test_the_form_for_one_row() -> None:
    """``vector_dot`` is exact up to the longest sums that it is chosen for."""
    rng = np.random.default_rng(0)
    for k, out, bits in ((1, 1, 4), (300, 130, 8), (4095, 3, 4), (1024, 5, 8)):
        x = jnp.asarray(rng.integers(-128, 128, (1, k)), jnp.int8)
        w = jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, k)), jnp.int8)
        np.testing.assert_array_equal(cpu.vector_dot(x, w), xla.s8_dot(x, w))
    low = jnp.full((1, 1024), -128, jnp.int8)
    np.testing.assert_array_equal(cpu.vector_dot(low, low), 1024 * 128 * 128)
    assert integer_dots(cpu.vector_dot, x, w).dots == [("int8", "int8", "int32")]
    q, weight, expected = operands(1, 6, 1, 20, 4, True)
    with tracing_for(cpu_target(short_row=4095)):
        assert form_of(1, weight) == "vector_dot"
        close(quantized_dot(q, weight), expected)
        for size, bits in ((4096, 4), (4096, 8)):
            assert form_of(1, operands(1, 6, 1, size, bits, True)[1]) == "padded_int_dot"
    with tracing_for(cpu_target(short_row=4095, jax_version=(0, 11))):
        assert form_of(1, weight) == "padded_int_dot"


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_long_rows_are_held_in_parts(rows) -> None:
    x, w, expected = operands(rows, 5, 1, 24, 4, True)
    with tracing_for(cpu_target(short_row=8)):
        parts = held(w.packed())
        assert parts.storage == "parts" and parts.values.shape == (3, 5, 8)
        assert form_of(1, parts) == "vector_dot"
        assert held(operands(1, 5, 2, 12, 4, True)[1]).storage == "int8"  # groups stay whole
    for features in (frozenset(), VNNI.features):
        with tracing_for(cpu_target(short_row=8, features=features)):
            close(quantized_dot(x, parts), expected)
            close(quantized_dot(x.dequantize(), parts), expected)


def test_a_head_of_8_bits_is_read_by_halves() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, (1, 700)), jnp.int8)
    w = jnp.asarray(rng.integers(-128, 128, (10, 700)), jnp.int8)
    np.testing.assert_array_equal(cpu.halves_dot(x, w), xla.s8_dot(x, w))
    assert integer_dots(cpu.halves_dot, x, w).integer_only
    q, weight, expected = operands(1, 6, 1, 20, 8, True)
    with tracing_for(cpu_target(short_row=4095)):
        assert form_of(1, weight) == "halves_dot"
        assert form_of(1, operands(1, 5, 1, 20, 8, True)[1]) != "halves_dot"
        close(quantized_dot(q, weight), expected)


def test_what_ends_a_layer() -> None:
    """Bias is added in float32, the result is rounded once, and the residual is added last."""
    x, w, expected = operands(3, 5, 1, 20, 4, True)
    rng = np.random.default_rng(1)
    bias, stream = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5,), (3, 5)))
    got = quantized_dot(x, w, Epilogue(bias, stream))
    close(got, expected + np.asarray(bias) + np.asarray(stream))
    end = Epilogue(bias, stream.astype(jnp.bfloat16), dtype=jnp.bfloat16)
    low = quantized_dot(x, w, end)
    assert low.dtype == jnp.bfloat16
    product = jnp.asarray(expected + np.asarray(bias), jnp.bfloat16)
    assert relative(low, np.asarray(product + stream.astype(jnp.bfloat16), np.float64)) < 4e-3


def test_the_chosen_form() -> None:
    w = operands(1, 6, 1, 20, 4, True)[1]
    for to in (cpu_target(), Target.named("tpu")):
        with tracing_for(to):
            assert form_of(1, w) == "padded_int_dot"
            assert form_of(2, w) == "int_dot"
            assert form_of(2, w, "float") == "weight_only"
    with tracing_for("gpu"):
        assert form_of(1, held(w)) == "pallas_gpu_gemv"
        assert form_of(17, held(w)) == "pallas_gpu"
        assert form_of(17, held(w), "float") == "packed_weight_only"
        assert form_of(17, w, "float") == "weight_only"
        assert form_of(17, w) == "int_dot"  # not in the kernels' storage
        grouped, wide = operands(1, 6, 4, 5, 4, True)[1], operands(1, 6, 1, 20, 8, True)[1]
        assert form_of(1, grouped) == form_of(17, wide) == "int_dot"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_int4_arrays(rows, groups) -> None:
    """Accelerators hold int4 arrays; on CPU products use them as int8."""
    x, w, expected = operands(rows, 5, groups, 6, 4, True)
    native = w.packed().native()
    assert native.storage == "int4" and native.values.dtype == jnp.int4
    for same in (native.unpacked(), native.packed().unpacked()):
        np.testing.assert_array_equal(same.values, w.values)
    close(quantized_dot(x, native), expected)
    close(xla.int_dot(x, native), expected)
    close(xla.weight_only_dot(x.dequantize(), native), expected)
    with tracing_for("tpu"):
        text = str(jax.make_jaxpr(quantized_dot)(x, native))
        assert held(w.packed()).storage == "int4"
        close(quantized_dot(x, native), expected)
    assert f"i4[5,{groups * 6}]" in text and "i8[5," not in text
    with tracing_for(cpu_target()):
        assert held(native).storage == held(w.packed()).storage == "int8"


def test_a_float_row_on_tpu() -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, 24), (5, 24)))
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    with tracing_for("tpu"):
        assert "f32[2,5]" in str(jax.make_jaxpr(float_dot)(x, w))
        assert relative(float_dot(x, w), expected) < EXACT
    assert relative(float_dot(x, w), expected) < EXACT


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense(rows, bias, group_size, bits) -> None:
    rng = np.random.default_rng(0)
    dense = Dense(24, 5, bias=bias, section=Section(bits, group_size, "static"), rngs=nnx.Rngs(0))
    kernel = quantize_weight(jnp.asarray(rng.normal(size=(5, 24)), jnp.float32), bits, group_size)
    dense.kernel.set_value(kernel.packed())
    shift = rng.normal(size=5).astype(np.float32) if bias else 0
    if bias:
        dense.bias.set_value(jnp.asarray(shift))
    x = quantize_dynamic(jnp.asarray(rng.normal(size=(rows, 24)), jnp.float32))
    exact = np.asarray(x.dequantize(), np.float64) @ np.asarray(kernel.dequantize(), np.float64).T
    assert relative(dense(x), exact + shift) < EXACT


def test_a_float_dense_accepts_quantised_input() -> None:
    dense = Dense(8, 3, rngs=nnx.Rngs(0))
    x = quantize_dynamic(jnp.ones((2, 8)))
    np.testing.assert_allclose(dense(x), dense(x.dequantize()), rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_many_rows_multiply_integers(group_size, packed) -> None:
    _, w, _ = operands(2, 5, 24 // (group_size or 24), group_size or 24, 4, False)
    w = w.packed() if packed else w

    def program(x, w):
        return quantized_dot(quantize_dynamic(x), w)

    use = integer_dots(program, jnp.ones((2, 24)), w)
    assert use.integer_only and len(use.dots) == 1, use
    text = jax.jit(program).lower(jnp.ones((2, 24)), w).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line and "i8>" in line]
    assert len(lines) == 1
    assert re.search(r"\(tensor<\S+xu?i8>, tensor<\S+xi8>\) -> tensor<\S+xi32>", lines[0])


def test_the_helper_sees_floats() -> None:
    x, w, _ = operands(1, 5, 1, 24, 4, False)
    use = integer_dots(lambda x, w: xla.weight_only_dot(x.dequantize(), w), x, w)
    assert not use.integer_only and use.float_copies
    use = integer_dots(lambda x, w: xla.weight_only_dot(x, w), jnp.ones((3, 24)), w)
    assert not use.integer_only and use.float_copies
    assert not integer_dots(lambda x: x @ x.T, jnp.ones((3, 24))).integer_only


RECIPES = ["w4a8", "w4a8-v8", "w8a8", "w4a8-dynamic", "groups"]


@pytest.fixture(scope="module", params=mostly_slow(RECIPES, "w4a8", "w4a8-dynamic", "groups"))
def quantised(request):
    hf, inputs, _ = golden("qwen2_vl", "public")
    config = Qwen2VLConfig.from_hf(hf)
    if request.param == "groups":
        recipe = dataclasses.replace(PRESETS["w4a8"], language=Section(4, 32, "static"))
    else:
        recipe = PRESETS[request.param]
    return random_quantised(config, recipe), reference_batch(config, inputs)


# Patch embedding, 6 in a vision block, 2 in the merger; 7 in a decoder block and the head.
VISION, DECODER = 1 + 6 + 2, 7 + 1


def test_a_whole_model_multiplies_integers(quantised) -> None:
    model, batch = quantised
    graphdef, state = nnx.split(model)
    use = integer_dots(lambda s, b: nnx.merge(graphdef, s)(b), state, batch)
    assert use.integer_only and len(use.dots) == VISION + DECODER, use
    cache = model.language.init_cache(2, 40)
    use = integer_dots(lambda s, b, c: nnx.merge(graphdef, s).prefill(b, c), state, batch, cache)
    assert use.integer_only and len(use.dots) == VISION + DECODER, use


def test_batched_decoding_multiplies_integers(quantised) -> None:
    model, _ = quantised
    graphdef, state = nnx.split(model)
    ids = jnp.zeros((2,), jnp.int32)
    cache = model.language.init_cache(2, 8)
    use = integer_dots(lambda s, t, c: nnx.merge(graphdef, s).decode(t, t, t, c), state, ids, cache)
    assert use.integer_only and len(use.dots) == DECODER, use


def test_a_quantised_model_gives_finite_logits(quantised) -> None:
    model, batch = quantised
    logits = forward(model, batch)
    assert np.isfinite(np.asarray(logits)[np.asarray(batch.order) >= 0]).all()
