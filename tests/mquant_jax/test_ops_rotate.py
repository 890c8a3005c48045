"""Rotation: TPU and GPU kernels (in interpret mode without their device) and the CPU's row blocks
against the plain implementation, and the selection among them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.hadamard import Rotation, hadamard, plan_rotation
from mquant_jax.numerics import quantize_dynamic, quantize_static
from mquant_jax.ops import pallas_tpu, rotate_gpu
from mquant_jax.ops.rotate import ROTATE, Rotated, rotate, rotate_quantize
from mquant_jax.target import tracing_for
from tests.helpers import interpreting, on_cpu

BACKENDS = {pallas_tpu: "tpu", rotate_gpu: "gpu"}


def form_of(rotation: Rotation, rows: int, dtype) -> str:
    return ROTATE.choose(Rotated(rows, rotation, dtype)).name


def interpreted(kernels) -> bool:
    """Whether kernels run in interpret mode, because their device is absent."""
    return jax.default_backend() != BACKENDS[kernels]


@pytest.mark.parametrize(
    ("kernels", "rows", "outer"),
    [(pallas_tpu, rows, outer) for rows, outer in ((1, 2), (64, 12), (65, 20), (130, 1))]
    + [(rotate_gpu, rows, outer) for rows, outer in ((3, 20), (2, 1))],
    ids=lambda value: BACKENDS.get(value),
)
def test_kernel(kernels, rows, outer) -> None:
    rng = np.random.default_rng(0)
    n = 128 * outer
    how = {"interpret": interpreted(kernels)}
    x = jnp.asarray(rng.normal(size=(rows, n)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.005, 0.05, (rows, 1)), jnp.float32)
    matrix = np.kron(hadamard(outer), hadamard(128)) * n**-0.5
    exact = np.asarray(x, np.float64) @ matrix
    got = np.asarray(kernels.rotate(x, outer, **how), np.float64)
    assert np.abs(got - exact).max() < 0.02 * np.abs(exact).max()  # bfloat16 intermediates
    q = kernels.rotate(x, outer, scale, **how)
    assert q.dtype == jnp.int8 and q.shape == (rows, n)
    expected = np.clip(exact / np.asarray(scale), -128, 127)
    # Half a step for rounding, plus bfloat16's error before it.
    assert np.abs(np.asarray(q) - expected).max() < 0.5 + 0.02 * 128


@pytest.mark.parametrize("kernels", BACKENDS, ids=BACKENDS.values())
def test_kernel_pads(kernels) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 10 * 128)), jnp.bfloat16)
    how = {"interpret": interpreted(kernels)}
    whole = kernels.rotate(jnp.pad(x, ((0, 0), (0, 256))), 12, **how)
    np.testing.assert_array_equal(kernels.rotate(x, 12, **how), whole)


@pytest.mark.parametrize("kernels", BACKENDS, ids=BACKENDS.values())
def test_kernel_saturates(kernels) -> None:
    x = jnp.zeros((1, 128), jnp.bfloat16).at[0, 1].set(1e4)  # a column with both signs
    q = np.asarray(kernels.rotate(x, 1, jnp.full((1, 1), 0.1), interpret=interpreted(kernels)))
    assert set(q.ravel().tolist()) == {-128, 127}


def test_plans_fill_the_lanes_where_that_is_cheap() -> None:
    for n, outer in ((18944, 148), (5120, 40), (14336, 112)):
        assert (plan_rotation(n).outer, plan_rotation(n).inner) == (outer, 128)
    assert plan_rotation(1536).inner == 48  # 12 x 128 costs 1.75 times as much
    assert plan_rotation(8960).inner == 112  # no Hadamard matrix of order 70
    padded = plan_rotation(8960, may_pad=True)
    assert (padded.n, padded.padding, padded.outer, padded.inner) == (9216, 256, 72, 128)


@pytest.mark.parametrize("lead", [(2, 64), (96,), (1, 40)])
def test_rows_on_cpu(lead) -> None:
    rotation = Rotation(48, 1, 4, 12, 3, 4)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*lead, 44)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.01, 0.05, (*lead, 1)), jnp.float32)
    with on_cpu():
        assert form_of(rotation, x.size // 44, x.dtype) == "rows_cpu"
        got, whole = rotate(x, rotation), rotation(x)
        np.testing.assert_allclose(got, whole, atol=1e-5)
        for s in (scale, jnp.float32(0.03), None):
            q = rotate_quantize(x, rotation, s)
            ref = quantize_dynamic(whole) if s is None else quantize_static(whole, s)
            assert q.values.shape == (*lead, 48) and q.values.dtype == jnp.int8
            np.testing.assert_allclose(q.scale, ref.scale, rtol=1e-5)
            assert np.abs(q.values.astype(int) - ref.values.astype(int)).max() <= 1
            assert np.mean(np.asarray(q.values) != np.asarray(ref.values)) < 0.01


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what CPUs do")
@pytest.mark.parametrize("n", [512, 1280, 3420, 4864, 5120, 8960, 11008])
def test_a_row_on_cpu_has_the_same_bits_beside_any_others(n) -> None:
    rotation = plan_rotation(n)
    x = np.random.default_rng(n).standard_normal((256, n)).astype(np.float32)
    run = jax.jit(lambda x: rotate(x, rotation))
    alone = np.asarray(run(x[:1]))
    for rows in (2, 3, 8, 16, 32, 33, 64, 256):
        np.testing.assert_array_equal(run(x[:rows])[:1], alone)
        np.testing.assert_array_equal(run(x[rows - 1 :: -1])[-1:], alone)


@pytest.mark.parametrize(
    ("platform", "seed", "padding"),
    [("tpu", None, 12), ("tpu", 3, 12), ("tpu", 3, 128), ("gpu", None, 12), ("gpu", 3, 128)],
)
def test_forms_agree(platform, seed, padding) -> None:
    """The accelerator's full path agrees with the plain one."""
    rotation = Rotation(512, 1, 4, 128, seed, padding)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 40, rotation.inputs)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.02, 0.05, (2, 40, 1)), jnp.float32)
    with on_cpu():
        plain, q = rotate(x, rotation), rotate_quantize(x, rotation, scale)
        np.testing.assert_array_equal(q.values, quantize_static(plain, scale).values)
        exact = quantize_static(rotation(x.astype(jnp.float32)), scale)
    with interpreting(platform) as ran:
        theirs, shared = rotate(x, rotation), rotate_quantize(x, rotation, jnp.float32(0.03))
        per_row = rotate_quantize(x, rotation, scale)
    assert [choice.name for choice in ran] == [f"pallas_{platform}"] * 3
    assert theirs.dtype == plain.dtype and theirs.shape == (2, 40, 512)
    np.testing.assert_allclose(theirs.astype(float), plain.astype(float), atol=0.05)
    # Compared with float32, because the plain bfloat16 result has an error of the same size.
    off = np.abs(per_row.values.astype(int) - exact.values.astype(int))
    assert off.max() <= 1 and per_row.scale is scale
    assert shared.values.dtype == jnp.int8


def test_the_chosen_form() -> None:
    wide, narrow = plan_rotation(18944), plan_rotation(1536)
    with on_cpu():
        assert form_of(wide, 1024, jnp.bfloat16) == "rows_cpu"
    with tracing_for("tpu"):
        assert form_of(wide, 1024, jnp.bfloat16) == "pallas_tpu"
        assert form_of(wide, 1, jnp.bfloat16) == "xla"
        assert form_of(wide, 1024, jnp.float32) == "xla"
        assert form_of(narrow, 1024, jnp.bfloat16) == "xla"
        with tracing_for("gpu"):
            assert form_of(wide, 1024, jnp.bfloat16) == "pallas_gpu"
            assert form_of(plan_rotation(29568), 1024, jnp.bfloat16) == "xla"  # too wide
        x = jax.ShapeDtypeStruct((128, 18944), jnp.bfloat16)
        text = str(jax.make_jaxpr(lambda x: rotate(x, wide))(x))
        assert "pallas_call" in text
