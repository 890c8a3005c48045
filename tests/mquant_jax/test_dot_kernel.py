"""TPU kernels with int8 input or output, in interpret mode, against NumPy in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.nn.dense import Dense
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.nn.side_by_side import joined
from mquant_jax.nn.stack import scan_layers, stack_layers
from mquant_jax.numerics import QTensor, QWeight, quantize_static
from mquant_jax.ops import dense
from mquant_jax.ops.dense import held, quantized_dot
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.pallas_tpu_dot import few_dot, int4_dot
from mquant_jax.ops.pallas_tpu_norm import rms_quantize
from mquant_jax.recipe import Section
from mquant_jax.target import tracing_for
from tests.helpers import form_of, interpreting, relative

EXACT = 1e-6


def draw(rows: int, k: int, out: int, layers: int = 1, per_row: bool = True, seed: int = 0):
    """Scaled int8 rows and a stack of scaled int4 weights; both include the extreme values."""
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-128, 128, (rows, k)), rng.integers(-8, 8, (layers, out, k))
    x[0], w[:, 0] = -128, -8
    x_scale = rng.uniform(0.01, 2, (rows, 1) if per_row else ()).astype(np.float32)
    w_scale = rng.uniform(0.01, 2, (layers, out)).astype(np.float32)
    return rng, x, w, x_scale, w_scale


@pytest.mark.parametrize(
    ("rows", "k", "out", "per_row", "extras"),
    [(128, 256, 128, True, True), (135, 128, 256, False, True), (1, 384, 128, True, False),
     (1060, 128, 128, True, True), (290, 128, 384, False, False)],
)  # fmt: skip
def test_int4_dot(rows, k, out, per_row, extras) -> None:
    rng, x, w, x_scale, w_scale = draw(rows, k, out, 3, per_row)
    expected = (x @ w[1].T) * (x_scale.astype(float) * w_scale[1].astype(float))
    bias = rng.normal(size=out).astype(np.float32) if extras else None
    residual = rng.normal(size=(rows, out)).astype(np.float32) if extras else None
    expected = expected + (bias + residual if extras else 0)
    ours = (
        QTensor(jnp.asarray(x, jnp.int8), x_scale),
        jnp.asarray(w, jnp.int4),
        jnp.int32(1),
        w_scale,
    )
    ours = jax.tree.map(jnp.asarray, ours)
    got = int4_dot(*ours, Epilogue(bias, residual), interpret=True)
    assert got.shape == expected.shape and relative(got, expected) < EXACT
    if extras:
        narrow = jnp.asarray(residual, jnp.bfloat16)
        end = Epilogue(jnp.asarray(bias, jnp.bfloat16), narrow, dtype=jnp.bfloat16)
        got = int4_dot(*ours, end, interpret=True)
        assert got.dtype == jnp.bfloat16 and relative(got, expected) < 0.005


@pytest.mark.parametrize(
    ("rows", "k", "out", "per_row", "extras", "dtype"),
    [(1, 256, 384, False, True, jnp.int4), (1, 128, 128, True, False, jnp.int8),
     (2, 128, 256, True, True, jnp.int8), (7, 384, 128, False, True, jnp.int4),
     (33, 256, 256, True, True, jnp.int4), (127, 128, 128, True, False, jnp.int4)],
)  # fmt: skip
def test_few_dot(rows, k, out, per_row, extras, dtype) -> None:
    rng, x, w, x_scale, w_scale = draw(rows, k, out, 3, per_row)
    w = w * 16 + 5 if dtype == jnp.int8 else w
    expected = (x @ w[2].T) * (x_scale.astype(float) * w_scale[2].astype(float))
    bias = gate = residual = None
    if extras:
        bias = rng.normal(size=out).astype(np.float32)
        gate, residual = rng.normal(size=(2, rows, out)).astype(np.float32)
        expected = (expected + bias) * (gate / (1 + np.exp(-gate.astype(float)))) + residual
    q = QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(x_scale))
    ours = q, jnp.asarray(w, dtype), jnp.int32(2), jnp.asarray(w_scale)
    got = few_dot(*ours, Epilogue(bias, residual, gate), interpret=True)
    assert got.shape == expected.shape and relative(got, expected) < EXACT
    if extras:
        narrow = [jnp.asarray(a, jnp.bfloat16) for a in (bias, residual, gate)]
        got = few_dot(*ours, Epilogue(*narrow, jnp.bfloat16), interpret=True)
        assert got.dtype == jnp.bfloat16 and relative(got, expected) < 0.008


def test_the_door_leads_to_the_kernel() -> None:
    """``quantized_dot`` with the axes, scales and storage that Dense passes agrees with XLA's
    implementation up to fused multiply-add rounding."""
    rng, x, w, x_scale, w_scale = draw(2 * 80, 256, 128)
    q = QTensor(
        jnp.asarray(x.reshape(2, 80, 256), jnp.int8), jnp.asarray(x_scale).reshape(2, 80, 1)
    )
    weight = QWeight(jnp.asarray(w[0], jnp.int8), jnp.asarray(w_scale[0])[:, None], 256, 4, "int8")
    bias = jnp.asarray(rng.normal(size=128), jnp.float32)
    residual = jnp.asarray(rng.normal(size=(2, 80, 128)), jnp.float32)
    end = Epilogue(bias, residual)
    plain = quantized_dot(q, weight, end)
    with interpreting("tpu") as ran:
        for same in (weight.native(), weight.packed(), weight):
            got = quantized_dot(q, same, end)
            assert got.shape == plain.shape and relative(got, plain) < EXACT
    assert [choice.name for choice in ran] == ["pallas_tpu"] * 3
    gated = dataclasses.replace(end, gate=residual + 1)
    with interpreting("tpu"):
        got = quantized_dot(q, weight, gated)
    assert relative(got, quantized_dot(q, weight, gated)) < EXACT
    few, gated = jax.tree.map(lambda a: a[1:, 78:] if a.ndim == 3 else a, (q, gated))
    plain = quantized_dot(few, weight, gated)
    with interpreting("tpu") as ran:
        got = quantized_dot(few, weight.native(), gated)
    assert got.shape == plain.shape == (1, 2, 128) and relative(got, plain) < EXACT
    assert [choice.name for choice in ran] == ["pallas_tpu_few"]


def test_the_chosen_form() -> None:
    def weight(out, k, groups=1, bits=4):
        scale = jax.ShapeDtypeStruct((out, groups), jnp.float32)
        return QWeight(jax.ShapeDtypeStruct((out, k), jnp.int4), scale, k, bits, "int4")

    small = weight(1280, 1280)
    assert form_of(1024, small) != "pallas_tpu"  # on CPU
    for kind in ("TPU v5e", "TPU v5 lite", "TPU v5p", "TPU v6 lite", ""):
        with tracing_for("tpu", kind):
            assert form_of(1024, small) == "pallas_tpu"
            assert form_of(1024, small, "float") == "weight_only"
            for shape in ((5120, 1280), (3584, 18944), (1280, 1176), (100, 1280)):
                assert form_of(1024, weight(*shape)) == "int_dot"
            for shape in ((1280, 1280), (5120, 1280), (3584, 18944)):
                assert form_of(16, weight(*shape)) == "pallas_tpu_few"
                assert form_of(1, weight(*shape)) == "pallas_tpu_few"
            for shape in ((1280, 1176), (100, 1280)):
                assert form_of(16, weight(*shape)) == "int_dot"
                assert form_of(1, weight(*shape)) == "padded_int_dot"
            for other in ((10, 4), (1, 8)):  # groups, bits
                assert form_of(1024, weight(1280, 1280, *other)) == "int_dot"
            assert form_of(1, weight(1280, 1280, 1, 8)) == "pallas_tpu_few"
            assert form_of(1, weight(1280, 1280, 10, 4)) == "padded_int_dot"


def test_a_tpu_without_integers(caplog) -> None:
    """Up to v4, products run in bf16 with equal results, and one warning says so."""
    _, x, w, x_scale, w_scale = draw(130, 256, 128)
    q = QTensor(jnp.asarray(x, jnp.int8), jnp.asarray(x_scale))
    weight = QWeight(jnp.asarray(w[0], jnp.int8), jnp.asarray(w_scale[0])[:, None], 256, 4, "int8")
    expected = (x @ w[0].T) * (x_scale.astype(float) * w_scale[0].astype(float))
    dense._tell_of_bf16.cache_clear()
    with tracing_for("tpu", "TPU v4"):
        for rows in (130, 1):
            assert form_of(rows, weight) == "bf16_dot"
            some = QTensor(q.values[:rows], q.scale[:rows])
            assert relative(quantized_dot(some, weight.native()), expected[:rows]) < EXACT
            text = str(jax.make_jaxpr(quantized_dot)(some, weight.native()))
            assert f"bf16[{rows},256]" in text and "preferred_element_type=float32" in text
    assert len([r for r in caplog.records if "W4A16" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("rows", "n", "per_row"), [(128, 256, True), (70, 200, False), (5, 128, True)]
)
def test_rms_quantize(rows, n, per_row) -> None:
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, n)) * 30, jnp.bfloat16)
    weight = rng.uniform(0.5, 2, n).astype(np.float32)
    scale = rng.uniform(0.005, 0.03, (rows, 1) if per_row else ()).astype(np.float32)
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6) * weight / scale
    got = rms_quantize(x, jnp.asarray(weight), 1e-6, jnp.asarray(scale), interpret=True)
    off = np.abs(np.asarray(got, int) - np.clip(np.round(normed), -128, 127))
    assert got.dtype == jnp.int8 and off.max() <= 1 and off.mean() < 0.001
    assert {-128, 127} <= set(np.asarray(got).ravel().tolist())


def test_a_norm_quantises_for_its_point() -> None:
    norm, point = RMSNorm(128, 1e-6, jnp.bfloat16), ActQuant("p", Section(4, None, "static"), 2)
    point.act_scale.set_value(jnp.asarray([0.02, 0.04]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 128)), jnp.bfloat16)
    cls = jnp.asarray(np.arange(80).reshape(2, 40) % 2)
    plain = point(norm.into(point, x, cls, None), cls)
    with interpreting("tpu") as ran:
        q = point(norm.into(point, x, cls, None), cls)
        few = norm.into(point, x[:, :1], cls[:, :1], None)
        assert norm.into(point, x, cls, lambda name, x: x).dtype == jnp.bfloat16
        dynamic = ActQuant("p", Section(4, None, "dynamic"))
        assert norm.into(dynamic, x, cls, None).dtype == jnp.bfloat16
    assert [choice.name for choice in ran] == ["pallas_tpu", "xla"]
    assert ran[1].refused == (("pallas_tpu", "2 rows; the least is 64"),)
    assert np.abs(few.values - plain.values[:, :1].astype(int)).max() <= 1
    assert np.abs(q.values.astype(int) - plain.values.astype(int)).max() <= 1
    np.testing.assert_array_equal(q.scale, plain.scale)


def test_kernels_fetch_their_layer_from_the_stack() -> None:
    _, _, w, _, w_scale = draw(128, 128, 128, 3)
    section = Section(4, None, "static")
    stack = stack_layers(
        lambda r: Dense(128, 128, bias=False, section=section, rngs=r), 3, nnx.Rngs(0)
    )
    stack.kernel.set_value(
        QWeight(jnp.asarray(w, jnp.int8), jnp.asarray(w_scale)[..., None] / 50, 128, 4, "int8")
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(128, 128)), jnp.float32)

    def run(rows):
        def body(layer, carry):
            return layer(quantize_static(carry, jnp.float32(0.5)))

        return scan_layers(body, stack, rows)

    plain, one = run(x), run(x[:1])
    with interpreting("tpu") as ran:
        stack.kernel.set_value(held(stack.kernel.get_value()))
        assert relative(run(x), plain) < EXACT
        assert relative(run(x[:1]), one) < EXACT
    assert [choice.name for choice in ran] == ["pallas_tpu", "pallas_tpu_few"]


def test_single_numbers_are_cut_out_together() -> None:
    """Joining small arrays of a stack, to slice them together, keeps every layer's values."""
    rng = np.random.default_rng(0)
    shapes = {"a": (), "b": (3,), "long": (40,), "c": (2, 2), "w": (8, 16)}
    stacks = {n: jnp.asarray(rng.normal(size=(5, *s)), jnp.float32) for n, s in shapes.items()}
    stacks["i"] = jnp.arange(5)
    fewer, restored = joined(stacks)
    assert len(jax.tree.leaves(fewer)) == 4  # two long arrays, and one joined array per dtype
    for i in range(5):
        layer = restored(jax.tree.map(lambda x, i=i: x[i], fewer))
        jax.tree.map(np.testing.assert_array_equal, layer, {n: x[i] for n, x in stacks.items()})
