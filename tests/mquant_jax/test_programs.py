"""Compiled programs: bounded in number; padding and other rows change no answer."""

import gc

import jax
import numpy as np
import pytest

from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.cache import NEVER
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.programs import Programs
from mquant_jax.runtime.prompts import padded, split_pictures, split_prompts
from mquant_jax.runtime.sampling import Sampling
from tests.helpers import forward, golden_qwen2_vl, relative

NEVER_STOP = (-1,)


@pytest.fixture(scope="module")
def case():
    model, config, inputs, _ = golden_qwen2_vl("public")
    return model, config, FAMILY.reference_batch(config, inputs)


@pytest.fixture(scope="module")
def prompts(case):
    """Text-only prompts and pictures of several sizes."""
    config = case[1]
    sizes = [(9, 0), (40, 56), (20, 112), (3, 84), (70, 28)]
    return [FAMILY.example_prompt(config, tokens, side) for tokens, side in sizes]


def test_the_least_recently_used_goes() -> None:
    programs = Programs(limit=2)
    made = []

    def get(key):
        return programs.get("model", (key,), lambda: made.append(key) or key)

    for key in ("a", "b", "a", "c", "a", "b"):
        assert get(key) == key
    assert made == ["a", "b", "c", "b"] and len(programs) == 2 and programs.compiled == 4
    assert programs.keys("model") == [("a",), ("b",)]
    programs.forget("model")
    assert len(programs) == 0
    with pytest.raises(ValueError, match="limit is 0"):
        Programs(0)


def test_dropped_programs_are_freed(case) -> None:
    model, config, _ = case
    client = jax.devices()[0].client
    generator = Generator(model, NEVER_STOP, programs=Programs(limit=4))
    alive = []
    for tokens in (10, 100, 200, 300):
        prompt = FAMILY.example_prompt(config, tokens, 0)
        generator.generate(FAMILY.collate(config, [prompt]), 2)
        gc.collect()
        alive.append(len(client.live_executables()))
    assert len(generator.programs) == 4 < generator.programs.compiled
    assert alive[-1] <= alive[1] + 4


def test_a_generator_takes_its_programs_with_it(case) -> None:
    model, _, batch = case
    programs = Programs()
    generator = Generator(model, NEVER_STOP, programs=programs)
    generator.generate(batch, 2)
    assert len(programs) > 0
    del generator
    gc.collect()
    assert len(programs) == 0


def test_a_new_temperature_compiles_nothing(case) -> None:
    model, _, batch = case
    generator = Generator(model, NEVER_STOP, programs=Programs())
    generator.generate(batch, 4)
    compiled = generator.programs.compiled
    for how in (Sampling(0.7), Sampling(1.3, top_k=5), Sampling(0.2, top_p=0.4), Sampling()):
        generator.generate(batch, 3, how, jax.random.key(4))
    assert generator.programs.compiled == compiled


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.5), Sampling(1.5, top_k=20, top_p=0.9)])
def test_answers_do_not_depend_on_company(case, prompts, how) -> None:
    model, config, _ = case
    generator = Generator(model, NEVER_STOP, programs=Programs())
    together = generator.generate(FAMILY.collate(config, prompts), 6, how, jax.random.key(3))
    fewer = generator.generate(FAMILY.collate(config, prompts[:2]), 6, how, jax.random.key(3))
    assert together.tokens[:2] == fewer.tokens
    if how == Sampling():
        for prompt, tokens in zip(prompts, together.tokens, strict=True):
            assert generator.generate(FAMILY.collate(config, [prompt]), 6).tokens == [tokens]


def test_rows_of_padding_are_done_from_the_start(case, prompts) -> None:
    model, config, _ = case
    generator = Generator(model, NEVER_STOP, programs=Programs())
    answers = generator.start(FAMILY.collate(config, prompts), 4)
    assert answers.done.tolist() == [False] * 5 + [True] * 3
    held = (np.asarray(answers.state.cache.order) != NEVER).sum(axis=1)
    assert held.tolist() == [len(p.input_ids) for p in prompts] + [0] * 3


def test_warming_up_leaves_little_to_compile(case, prompts) -> None:
    model, config, _ = case
    generator = Generator(model, NEVER_STOP, programs=Programs())
    labels = []

    def progress(items, label):
        labels.append(label)
        return items

    alive = generator.warm_up(rows=1, prompt=128, picture=64, new_tokens=8, progress=progress)
    assert labels == ["compile"] and alive == generator.programs.compiled
    for prompt in prompts:
        generator.generate(FAMILY.collate(config, [prompt]), 8)
    assert generator.programs.compiled == alive


def test_batches_for_users_programs_are_padded_and_equal(case, prompts) -> None:
    model, config, _ = case
    batch = FAMILY.collate(config, prompts)
    wide = padded(model, batch)
    assert wide.order.shape == (5, 128) and wide.vision.valid.shape == (4, 64)
    got, expected = np.asarray(forward(model, wide)), np.asarray(forward(model, batch))
    real = batch.order >= 0
    assert relative(got[:, -batch.order.shape[1] :][real], expected[real]) < 1e-5


def test_groups_hold_every_row_once(case, prompts) -> None:
    model, config, _ = case
    batch = FAMILY.collate(config, prompts)
    pictures = list(split_pictures(model.vision, batch.vision, "cpu"))
    assert sorted(r for group in pictures for r in group.rows) == [0, 1, 2, 3]
    assert sum(group.vision.valid.sum() for group in pictures) == batch.vision.valid.sum()
    for aifs in (False, True):
        groups = list(split_prompts(model, batch, aifs, "cpu"))
        assert sorted(r for group in groups for r in group.rows) == list(range(5))
        tokens = sum((group.batch.order >= 0).sum() for group in groups)
        assert tokens == (batch.order >= 0).sum()
        for group in groups:
            assert group.batch.visual_index.max() < 64 * max(1, len(group.features))
