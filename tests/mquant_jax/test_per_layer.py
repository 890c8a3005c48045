"""Products with separate arrays per layer are bit-identical to products with slices of a stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.soak import random_weights
from benchmarks.speed import random_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.dense import linear
from mquant_jax.numerics import QTensor, QWeight, pack_int4, quantize_weight
from mquant_jax.ops.epilogue import PLAIN
from mquant_jax.per_layer import PerLayer
from mquant_jax.presets import PRESETS
from mquant_jax.runtime.engine_programs import EnginePrograms
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.programs import Programs
from mquant_jax.runtime.split_layers import split_layers
from mquant_jax.target import tracing_for
from tests.helpers import cpu_target

LAYERS, OUT, IN = 3, 32, 64


def layer_products(kernels: list, split, x) -> None:
    """Each layer's product, from separate arrays and from the stack."""

    @jax.jit
    def product(kernel, layer, x):
        return linear(x, dataclasses.replace(kernel, layer=layer), PLAIN)

    for layer, kernel in enumerate(kernels):
        expected = jax.jit(lambda x, kernel=kernel: linear(x, kernel, PLAIN))(x)
        np.testing.assert_array_equal(product(split, jnp.int32(layer), x), expected)


@pytest.mark.parametrize("features", [frozenset(), frozenset({"avx512_vnni"})])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize(
    "bits, group, parts, rows", [(4, None, 1, 8), (4, None, 2, 8), (4, 16, 1, 8), (4, 16, 1, 64)]
)
def test_quantised_products(bits, group, parts, rows, activations, features) -> None:
    rng = np.random.default_rng(rows)
    stack = rng.standard_normal((LAYERS, OUT, IN), np.float32)
    kernels = [quantize_weight(jnp.asarray(w), bits, group) for w in stack]
    kernels = [k.in_parts(parts) if parts > 1 else k for k in kernels]
    values = tuple(tuple(k.values) if parts > 1 else k.values for k in kernels)
    scale = jnp.stack([k.scale for k in kernels])
    split = QWeight(PerLayer(values), scale, IN, bits, kernels[0].storage)
    x = jnp.asarray(rng.integers(-99, 99, (rows, IN)), jnp.int8)
    quantised = activations == "int8"
    operand = QTensor(x, jnp.float32(0.1)) if quantised else x.astype(jnp.float32)
    with tracing_for(cpu_target(features)):
        layer_products(kernels, split, operand)


def test_float_products() -> None:
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((LAYERS, OUT, IN), np.float32))
    split = PerLayer(tuple(stack))
    assert split.shape == stack.shape and split.of_layer(jnp.int32(0)).shape == stack.shape[1:]
    layer_products(list(stack), split, jnp.asarray(rng.standard_normal((8, IN), np.float32)))


def test_steps_do_not_grow_with_the_layers() -> None:
    """Each further layer adds one branch per product, and no compiled code."""

    def kernels(layers: int) -> int:
        config = random_weights("demo", 4).config
        language = dataclasses.replace(config.language, num_layers=layers)
        config = dataclasses.replace(config, language=language)
        model = random_model(FAMILY, config, PRESETS["w4a8"], jnp.float32)
        programs = EnginePrograms(Generator(model, (-1,), programs=Programs()), 8, 256, 64)
        return programs._program("step", 8).as_text().count("kind=kLoop")

    if jax.default_backend() != "cpu":
        pytest.skip("says what CPUs do")
    assert 10 < kernels(8) <= kernels(4)


def test_packed_weights_stay_stacked() -> None:
    """As quantisation in memory leaves them: products unpack them."""
    whole = quantize_weight(np.ones((2, 256, 512), np.float32), 4)
    packed = dataclasses.replace(whole, values=pack_int4(whole.values), storage="packed")
    for weight in (packed, whole):
        split = split_layers({"vision": {"layers": {"fc1": {"kernel": weight}}}})
        values = split["vision"]["layers"]["fc1"]["kernel"].values
        assert isinstance(values, PerLayer) == (weight is whole)
