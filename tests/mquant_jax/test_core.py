"""Behaviour that must not depend on JAX's configuration; CI runs these tests with
``JAX_ENABLE_X64=1`` and with ``JAX_NUMPY_RANK_PROMOTION=raise``.

    JAX_ENABLE_X64=1 python -m pytest -m core

Tests marked slow repeat, with JAX's default configuration, what other files test.
"""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.nn.params import get_params
from mquant_jax.numerics import QTensor, quantize_dynamic, quantize_static, quantize_weight
from mquant_jax.ops import decode_gpu, flash_gpu, pallas_tpu_norm, rotate_gpu
from mquant_jax.ops.attention import attend
from mquant_jax.ops.dense import quantized_dot
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.visibility import Visibility
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.ptq.gptq import gptq, prepare
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.sampling import Sampling
from mquant_jax.samples import DEMO_ASSETS
from tests.helpers import forward, golden_model, quantised, relative

pytestmark = pytest.mark.core


def wide_floats(program: Any) -> list[str]:
    """Equations of a traced program, nested ones included, that produce float64 arrays."""
    found = []

    def visit(jaxpr) -> None:
        for equation in jaxpr.eqns:
            found.extend(
                str(equation.primitive)
                for v in equation.outvars
                if getattr(v.aval, "dtype", None) == np.float64 and v.aval.ndim
            )
            for inner in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(program.jaxpr)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_vl/public", "minicpmv2_6/public", "cogvlm2/public"])
def test_answers_equal_the_reference(case) -> None:
    family, model, config, inputs, outputs = golden_model(case)
    batch = family.reference_batch(config, inputs)
    out = Generator(model, (-1,)).generate(batch, outputs["greedy"].shape[1])
    np.testing.assert_array_equal(out.tokens, outputs["greedy"])


@pytest.mark.parametrize(
    "case", ["internvl/public", "qwen_vl/public", "glm4v/public", "llama/public"]
)
def test_no_array_is_float64(case) -> None:
    family, model, config, inputs, _ = golden_model(case)
    batch = family.reference_batch(config, inputs)
    logits, state = jax.eval_shape(lambda m, b: mq.prefill(m, b, 1024), model, batch)
    assert logits.dtype == jnp.float32 and state.order.dtype == jnp.int32
    assert not wide_floats(jax.make_jaxpr(lambda m, b: mq.prefill(m, b, 1024))(model, batch))
    tokens = jax.ShapeDtypeStruct(state.order.shape, jnp.int32)
    assert not wide_floats(jax.make_jaxpr(mq.decode)(model, tokens, state))


@pytest.mark.slow
def test_sampling() -> None:
    family, model, config, inputs, _ = golden_model("qwen2_vl/public")
    batch = family.reference_batch(config, inputs)
    how = Sampling(0.9, top_k=20, top_p=0.8)
    generator = Generator(model, (-1,), kv_cache="int8")
    once, again = (generator.generate(batch, 4, how, jax.random.key(1)).tokens for _ in "ab")
    assert once == again


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a8-rtn", "w4a8"])
def test_quantisation(preset) -> None:
    family, model, config, inputs, _ = golden_model("qwen2_vl/public")
    batch = family.reference_batch(config, inputs)
    expected = np.asarray(forward(model, batch))
    config, params = untied(config, get_params(model))
    out, _ = quantize_params(family, config, PRESETS[preset], params, batch)
    assert all(np.asarray(v).dtype != np.float64 for v in jax.tree.leaves(out))
    real = np.asarray(batch.token_class) >= 0
    got = quantised(family, config, PRESETS[preset], out, batch)
    assert relative(got[real], expected[real]) < 0.7  # a tiny model loses much at 4 bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_dense(bits, group, rows) -> None:
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((48, 64)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(48), jnp.float32)
    w = quantize_weight(weight, bits, group)
    for q in (quantize_dynamic(x), quantize_static(x, jnp.float32(0.03)), x):
        y = quantized_dot(q, w, Epilogue(bias))
        back = q.dequantize() if isinstance(q, QTensor) else q
        assert y.dtype == jnp.float32
        assert relative(y, back @ w.dequantize().T + bias[None]) < 1e-3


def test_rounding_by_gptq() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((200, 32)), jnp.float32)
    inputs = prepare(x.T @ x)
    weight = jnp.asarray(rng.standard_normal((8, 32)), jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=1, keepdims=True) / 7
    q = gptq(weight, inputs, scale, 4)
    assert q.scale.dtype == jnp.float32 and relative(q.dequantize(), weight) < 0.2


def test_gpu_kernels() -> None:
    rng = np.random.default_rng(0)

    def bf16(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    q, k, v = bf16(1, 2, 20, 16), bf16(1, 1, 16, 20), bf16(1, 1, 20, 16)
    own = jnp.arange(20, dtype=jnp.int32)[None]
    seen = Visibility(own, own, after=0)
    y = flash_gpu.attend(q, k, v, seen, interpret=True)
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), seen)
    assert relative(y, exact) < 0.01
    stacks = k[None], v[None]
    last = decode_gpu.attend_one(
        q[:, :, -1], *stacks, jnp.int32(0), Visibility(own[:, -1:], own), interpret=True
    )
    assert relative(last, exact[:, -1]) < 0.01
    assert rotate_gpu.rotate(bf16(3, 256), 2, interpret=True).shape == (3, 256)


def test_tpu_kernels() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16)
    y = pallas_tpu_norm.rms_quantize(
        x, jnp.ones(256, jnp.float32), 1e-6, jnp.float32(0.05), interpret=True
    )
    assert y.dtype == jnp.int8


@pytest.mark.slow
def test_a_command_converts_and_a_model_answers(tmp_path) -> None:
    convert(DEMO_ASSETS / "model", tmp_path / "float", mq.PRESETS["float"])
    model = mq.load(tmp_path / "float")
    picture = np.zeros((64, 64, 3), np.uint8)
    answer = model.generate([picture], "What colour is it?", max_new_tokens=4)
    assert isinstance(answer, str)


def test_importing_and_loading_change_no_configuration() -> None:
    code = """
import jax
before = dict(jax.config.values)
import mquant_jax as mq
import mquant_jax.api, mquant_jax.runtime.generate, mquant_jax.ptq.convert
changed = {k for k in before if jax.config.values[k] != before[k]}
assert not changed, changed
mq.api.keep_compiled_programs()
changed = {k for k in before if jax.config.values[k] != before[k]}
cache = {"jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"}
assert changed <= cache, changed
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
