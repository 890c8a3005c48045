"""Training a small LLaVA: the training form of the language model, pictures and questions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.llava_folder import merged
from examples import low_rank
from examples.llava_data import ANSWER, LENGTH, row_of
from examples.llava_pictures import PLACES, counting, scene, text
from mquant_jax.nn.params import set_params
from tests.helpers import GOLDENS, golden, golden_model, relative
from tests.llava_cases import CLIP


def updates_of(frozen: low_rank.Tree, rank: int) -> low_rank.Tree:
    """Random LoRA factors, large enough to change the outputs."""
    fresh = low_rank.fresh_updates(frozen, rank, seed=1)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), fresh)


def test_questions_see_the_picture_and_themselves_alone() -> None:
    """The training form with LoRA updates equals the package's model with the updates merged."""
    family, model, config, inputs, _ = golden_model(CLIP)
    source = load_file(GOLDENS / CLIP / "model.safetensors")
    shape = low_rank.shape_of(golden(*CLIP.split("/"))[0]["text_config"])
    frozen = low_rank.frozen_language(source, shape)
    updates = updates_of(frozen, 2)
    tensors = merged(source, low_rank.named_updates(updates))
    rules = family.weight_rules(config)
    set_params(model, {r.dst: r.apply(tensors[r.src].astype(np.float32)) for r in rules})

    rng = np.random.default_rng(0)
    front = rng.integers(0, 380, (2, 4))
    asked = rng.integers(0, 380, (2, 3, 5))
    table = np.asarray(frozen["embedding"], np.float32)
    got = low_rank.stream(shape, frozen, updates, jnp.asarray(table[front]), jnp.asarray(asked))
    order = jnp.arange(9)[None]
    for i in range(2):
        for j in range(3):
            ids = np.concatenate([front[i], asked[i, j]])[None]
            x = model.language(
                model.language.embed(ids), order[None], order, jnp.zeros_like(order)
            )  # fmt: skip
            assert relative(got[i, j], x[0, 4:]) < 0.02  # bfloat16 products


def test_gradients_of_products_are_those_of_float32() -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 8)), rng.normal(size=(5, 8))
    x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)

    def loss(product):
        return jax.grad(lambda x, k: (product(x, k) ** 2).sum(), argnums=(0, 1))(x, kernel)

    for got, wanted in zip(loss(low_rank.times), loss(lambda x, k: x @ k.T), strict=True):
        assert relative(got, wanted) < 0.01


def test_factors_are_added_to_their_matrix() -> None:
    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    up, down = np.asarray([[1.0], [2.0]], np.float32), np.asarray([[1.0, 0, 3]], np.float32)
    updates = {"a.weight.down": down, "a.weight.up": up, "c": np.ones(1)}
    out = merged(tensors, updates)
    np.testing.assert_array_equal(out["a.weight"], [[2, 1, 4], [3, 1, 7]])
    assert out["c"].dtype == np.float32 and sorted(out) == ["a.weight", "b", "c"]


@pytest.mark.parametrize("draw", [scene, counting, text])
def test_answers_fit_the_pictures(draw) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        for _ in range(20):
            picture = draw(rng, split)
            assert picture.image.dtype == np.uint8 and len(picture.questions) >= 4
            answers = dict(picture.questions)
            if draw is counting:
                total = int(answers["how many shapes are there?"])
                assert all(int(a) <= total for a in answers.values() if a.isdigit())
            if draw is text:
                string = next(a for q, a in picture.questions if q.startswith("read"))
                assert answers["what is the first character?"] == string[0]
                assert answers["how many characters are there?"] == str(len(string))


def test_places_are_named_row_by_row() -> None:
    assert PLACES[0] == "top left" and PLACES[4] == "center" and PLACES[5] == "middle right"


def test_only_answers_and_their_ends_are_learned() -> None:
    ids, at, labels = row_of([11, 12, 13], [7, 2])
    assert ids.tolist() == [11, 12, 13, 7, 2] + [0] * (LENGTH - 5)
    assert at.tolist() == [2, 3] + [-1] * (ANSWER - 2)  # 2 predicts 7, 3 predicts 2
    assert labels.tolist() == [7, 2] + [-1] * (ANSWER - 2)
    assert row_of([1] * LENGTH, [2]) is None and row_of([1], [2] * (ANSWER + 1)) is None
