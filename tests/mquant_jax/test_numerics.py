"""Integer formats: packing, rounding, saturation, and their pytrees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mquant_jax.numerics import (
    INT_MAX,
    QTensor,
    QWeight,
    expand_groups,
    grouped,
    pack_int4,
    quantize_dynamic,
    quantize_static,
    quantize_weight,
    round_to_grid,
    safe_scale,
    unpack_int4,
)

few = settings(max_examples=40, deadline=None)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=9)
# Every shape is another program in JAX.
few_shapes = st.sampled_from([(1,), (2,), (9,), (3, 1), (5, 8), (2, 3, 7), (1, 2, 4, 6)])


def nibbles(shapes):
    return shapes.flatmap(lambda s: hnp.arrays(np.int8, s, elements=st.integers(-8, 7)))


matrices = hnp.arrays(
    np.float32,
    st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 4), (4, 2), (5, 7)]),
    elements=st.floats(-1e3, 1e3, width=32),
)


@few
@given(nibbles(shapes))
def test_packing_round_trip(values) -> None:
    packed = pack_int4(values)
    assert packed.dtype == np.uint8 and isinstance(packed, np.ndarray)
    assert packed.shape == (*values.shape[:-1], (values.shape[-1] + 1) // 2)
    back = unpack_int4(packed, values.shape[-1])
    assert back.dtype == np.int8 and isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, values)


@few
@given(nibbles(few_shapes))
def test_packing_is_the_same_in_numpy_and_jax(values) -> None:
    packed = pack_int4(jnp.asarray(values))
    np.testing.assert_array_equal(packed, pack_int4(values))
    np.testing.assert_array_equal(unpack_int4(packed, values.shape[-1]), values)


def test_packing_is_by_halves() -> None:
    packed = pack_int4(np.array([1, -2, 3, -8, 7], np.int8))
    # columns 0 to 2 are low nibbles; 3, 4 and a zero are high ones
    np.testing.assert_array_equal(packed, [0x81, 0x7E, 0x03])


@few
@given(matrices, st.sampled_from([4, 8]))
def test_rounding_error_is_half_a_step(weight, bits) -> None:
    q = quantize_weight(jnp.asarray(weight), bits)
    error = np.abs(np.asarray(q.dequantize(), np.float64) - weight)
    bound = np.asarray(q.scale, np.float64) / 2
    assert (error <= bound * (1 + 1e-5)).all()
    assert np.abs(np.asarray(q.values, np.int32)).max() <= INT_MAX[bits]


@few
@given(st.integers(-30, 30), st.sampled_from([4, 8]))
def test_extreme_magnitudes(exponent, bits) -> None:
    # Computed in NumPy: XLA on CPU flushes subnormals. 1e30 must not overflow either.
    weight = (np.array([[1.0, -0.5, 0.25, 1.0]]) * 10.0**exponent).astype(np.float32)
    q = quantize_weight(jnp.asarray(weight), bits)
    back = np.asarray(q.dequantize(), np.float64)
    assert np.isfinite(back).all() and np.isfinite(np.asarray(q.scale)).all()
    # Steps below 1e-30 are not used: such a channel is zero in every float32 product.
    step = np.asarray(q.scale, np.float64)
    if weight.max() / INT_MAX[bits] > 1e-30:
        assert (np.abs(back - weight) <= step * 0.5001).all()
    else:
        np.testing.assert_array_equal(back, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_channels_stay_zero(bits) -> None:
    weight = jnp.zeros((3, 6)).at[1].set(2.0)
    q = quantize_weight(weight, bits)
    np.testing.assert_array_equal(q.scale[:, 0], [1, np.float32(2) / INT_MAX[bits], 1])
    np.testing.assert_allclose(q.dequantize(), weight, rtol=1e-6)
    assert float(safe_scale(jnp.float32(0), bits)) == 1


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -128, 127)])
def test_values_beyond_the_grid_saturate(bits, low, high) -> None:
    x = jnp.array([-1e9, -jnp.inf, 1e9, jnp.inf, 0.5, 1.5, 2.5])
    q = round_to_grid(x, jnp.float32(1), bits)
    np.testing.assert_array_equal(q, [low, low, high, high, 0, 2, 2])  # round half to even
    weight = quantize_weight(jnp.array([[100.0, -100.0, 1.0]]), bits, scale=jnp.ones((1, 1)) / 2)
    np.testing.assert_array_equal(weight.values, [[min(200, high), max(-200, low), 2]])


@few
@given(st.sampled_from([(12, 1), (12, 3), (12, 12), (9, 3), (7, 7)]), st.sampled_from([4, 8]))
def test_groups_have_scales_of_their_own(sizes, bits) -> None:
    k, size = sizes
    weight = np.random.default_rng(k * size).normal(size=(2, 5, k)).astype(np.float32)
    weight *= 10.0 ** np.arange(k)[None, None]
    q = quantize_weight(jnp.asarray(weight), bits, size)
    assert q.scale.shape == (2, 5, k // size) and q.groups == k // size
    step = np.repeat(np.asarray(q.scale), size, axis=-1)
    assert (np.abs(np.asarray(q.dequantize()) - weight) <= step * 0.50001).all()
    assert expand_groups(q.scale, k).shape == ((2, 5, k) if q.groups > 1 else (2, 5, 1))


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="group_size 5 does not divide in_features 12"):
        grouped(jnp.zeros((2, 12)), 5)


@pytest.mark.parametrize("k", [1, 6, 7])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_storage_forms_of_a_weight_agree(k, lead) -> None:
    weight = jnp.asarray(np.random.default_rng(k).normal(size=(*lead, 5, k)), jnp.float32)
    plain = quantize_weight(weight, 4)
    packed = plain.packed()
    assert packed.storage == "packed" and packed.values.dtype == jnp.uint8
    assert packed.values.shape == (*lead, 5, (k + 1) // 2) and packed.out_features == 5
    np.testing.assert_array_equal(packed.unpacked().values, plain.values)
    np.testing.assert_array_equal(packed.dequantize(), plain.dequantize())
    assert packed.packed() is packed and plain.unpacked() is plain


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_weight_in_parts(lead, array) -> None:
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(*lead, 5, 12)), jnp.float32)
    plain = jax.tree.map(array, quantize_weight(weight, 4))
    parts = plain.in_parts(3)
    assert parts.values.shape == (*lead, 3, 5, 4) and parts.out_features == 5
    np.testing.assert_array_equal(parts.values[..., 1, :, :], plain.values[..., 4:8])
    np.testing.assert_array_equal(parts.unpacked().values, plain.values)
    np.testing.assert_array_equal(parts.packed().values, plain.packed().values)
    if not lead:
        some = jnp.array([4, 0])
        for form in (plain, parts, plain.packed()):
            np.testing.assert_array_equal(form.rows(some).dequantize(), plain.dequantize()[some])


def test_parts_are_equal_and_have_no_groups() -> None:
    with pytest.raises(ValueError, match=r"5 parts of 12 columns, 1 group"):
        quantize_weight(jnp.ones((2, 12)), 4).in_parts(5)
    with pytest.raises(ValueError, match=r"2 parts of 12 columns, 3 group"):
        quantize_weight(jnp.ones((2, 12)), 4, 4).in_parts(2)


def test_8_bit_weights_are_never_packed() -> None:
    weight = quantize_weight(jnp.ones((2, 4)), 8)
    assert weight.packed() is weight and weight.storage == "int8"


def test_static_activations_saturate() -> None:
    x = jnp.array([[1.0, -1.0, 1000.0, -1000.0, 0.26]])
    q = quantize_static(x, jnp.float32(0.5))
    np.testing.assert_array_equal(q.values, [[2, -2, 127, -128, 1]])
    np.testing.assert_array_equal(q.dequantize(), [[1, -1, 63.5, -64, 0.5]])


@few
@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-60, 60, width=32)))
def test_static_error_is_half_a_step_inside_the_range(x) -> None:
    scale = jnp.array([[0.5], [1.0], [2.0]])  # one per token, as for token classes
    back = np.asarray(quantize_static(jnp.asarray(x), scale).dequantize())
    inside = np.abs(x) <= np.asarray(scale) * 127
    assert (np.abs(back - x)[inside] <= np.broadcast_to(scale / 2, x.shape)[inside] * 1.00001).all()


def test_dynamic_scales_are_per_token() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    x = x * jnp.array([1e-3, 1.0, 1e3])[None, :, None]
    q = quantize_dynamic(x)
    assert q.scale.shape == (2, 3, 1)
    np.testing.assert_array_equal(jnp.max(jnp.abs(q.values.astype(jnp.int32)), -1), 127)
    assert (np.abs(q.dequantize() - x) <= q.scale * 0.50001).all()
    zero = quantize_dynamic(jnp.zeros((1, 4)))
    np.testing.assert_array_equal(zero.scale, [[1]])
    np.testing.assert_array_equal(zero.values, 0)


def test_dynamic_keeps_low_precision_inputs() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.bfloat16)
    q = quantize_dynamic(x)
    assert q.values.dtype == jnp.int8 and q.scale.dtype == jnp.float32


def test_pytrees_pass_through_jit() -> None:
    q = quantize_weight(jnp.ones((2, 4)), 4).packed()
    out = jax.jit(lambda q: q)(q)
    assert isinstance(out, QWeight) and (out.in_features, out.bits, out.storage) == (4, 4, "packed")
    x = jax.jit(quantize_static)(jnp.ones((2, 4)), jnp.float32(1))
    assert isinstance(x, QTensor)


def test_pytrees_pass_through_tree_map_and_scan() -> None:
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 7)), jnp.float32)
    stack = quantize_weight(weight, 4).packed()
    first = jax.tree.map(lambda x: x[0], stack)
    assert isinstance(first, QWeight) and first.values.shape == (5, 4)

    def body(carry, layer: QWeight):
        return carry, layer.dequantize()

    out = jax.lax.scan(body, 0, stack)[1]
    np.testing.assert_array_equal(out, stack.dequantize())
