"""On CPU a row's results are bit-identical in any batch, in chunks or whole, in any program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mquant_jax as mq
from benchmarks.soak import random_request, random_weights
from mquant_jax.runtime.engine_programs import EnginePrograms
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.prefill import plan
from mquant_jax.runtime.programs import Programs
from mquant_jax.runtime.split_layers import split_layers

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what CPUs do")
COLUMNS = 1024


@pytest.fixture(scope="module")
def model():
    model = random_weights("demo", 4)
    generator = Generator(model.module, (-1,), programs=Programs())
    return dataclasses.replace(model, _generator=generator)


def read(model, programs: EnginePrograms, prompt):
    """Prefill a prompt into row 0; return the slots, its last hidden state and its columns."""
    made = plan(model.module, model.processor.collate([prompt]), programs.chunk)
    state = programs.empty()
    for chunk in made.chunks:
        state, hidden = programs.read(state, chunk, [], 0, made.position)
    return state, hidden, made.columns


@pytest.mark.parametrize("tokens", [150, 407])
def test_chunks_have_the_bits_of_the_whole(model, tokens) -> None:
    ids = np.random.default_rng(tokens).integers(97, 123, tokens).tolist()
    prompt = dataclasses.replace(model.processor.prompt("a"), input_ids=ids)
    found = []
    for chunk in (64, 256, 512):
        programs = EnginePrograms(model.generator, 1, COLUMNS, chunk)
        state, hidden, columns = read(model, programs, prompt)
        cache = state.cache.k[..., :columns], state.cache.v[..., :columns, :]
        found.append([np.asarray(x) for x in (hidden, *cache)])
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("recipe, alone", [("w4a8", [1]), ("float", [])])
def test_rows_have_the_bits_of_one(model, demo_float, recipe, alone) -> None:
    """Decode steps of all, some and one of the rows give the same bits. (Float models never decode
    one row, because XLA sums it in another order.)"""
    generator = model.generator
    if recipe == "float":
        generator = Generator(mq.load(demo_float).module, (-1,), programs=Programs())
    programs = EnginePrograms(generator, 9, COLUMNS, 64)
    rng = np.random.default_rng(0)
    state = jax.tree.map(np.asarray, programs.empty())
    values = [rng.standard_normal(x.shape).astype(x.dtype) for x in (state.cache.k, state.cache.v)]
    used = rng.integers(5, COLUMNS - 1, 9).astype(np.int32)
    order = np.where(np.arange(COLUMNS) < used[:, None], np.arange(COLUMNS), state.cache.order)
    cache = dataclasses.replace(
        state.cache, k=values[0], v=values[1], order=order.astype(np.int32), cursor=used
    )
    start = dataclasses.replace(state.start, order=used, position=used)
    token = rng.integers(97, 123, 9).astype(np.int32)
    state = dataclasses.replace(state, cache=cache, start=start, token=token)

    def after(rows: list[int]) -> np.ndarray:
        """New cache entries of all layers; each depends on all operations before it."""
        new, _ = programs.step(jax.tree.map(jnp.asarray, state), rows)
        at = np.asarray(rows), slice(None), slice(None), used[rows]
        return np.asarray(new.cache.k)[:, *at]

    whole = after(list(range(9)))
    some = after([3, 7, 5])
    assert np.array_equal(some, whole[[3, 7, 5]])
    assert all(np.array_equal(after([row])[0], whole[row]) for row in (0, 8))
    sizes = [k[-1] for k in generator.programs.keys(generator.owner)
             if k[:2] == ("engine step", 9)]  # fmt: skip
    assert sorted(sizes) == [*alone, 8, 9]


def test_greedy_answers_are_those_of_generate(model) -> None:
    rng = np.random.default_rng(1)
    requests = [random_request(model, rng, prompts=1) for _ in range(6)]
    prompts = [request.prompts[0] for request in requests]
    expected = [model.generate_prompts([p], 12).tokens[0] for p in prompts]
    assert model.generate_prompts(prompts, 12).tokens == expected
    with mq.Engine(model, slots=4, context=1000, reuse_bytes=0) as engine:
        together = [engine.submit(p, mq.RequestOptions(max_new_tokens=12)) for p in prompts]
        assert [r.result(300).tokens for r in together] == expected


def test_split_layers_share_the_memory(model) -> None:
    parts = split_layers(model.generator.params)
    stack = model.module.language.layers.up_proj.kernel.get_value().values
    begin, end = (stack.unsafe_buffer_pointer() + n for n in (0, stack.nbytes))
    inside = [x for x in jax.tree.leaves(parts) if begin <= x.unsafe_buffer_pointer() < end]
    assert len(inside) == len(stack) and sum(x.nbytes for x in inside) == stack.nbytes


def test_steps_copy_no_layer(model) -> None:
    programs = EnginePrograms(model.generator, 8, 256, 64)
    step = programs._program("step", 8)
    weights = sum(x.nbytes for x in jax.tree.leaves(model.generator.params))
    state = sum(x.nbytes for x in jax.tree.leaves(programs.empty()))
    assert step.memory_analysis().temp_size_in_bytes < min(weights, state) / 2
