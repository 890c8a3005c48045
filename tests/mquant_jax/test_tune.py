"""Learned scales: only scales and gains move, and the divergence falls."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.checkpoint.journal import Journal
from mquant_jax.models.base import abstract_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.numerics import QWeight, quantize_static, simulate_static
from mquant_jax.presets import PRESETS
from mquant_jax.ptq import pipeline
from mquant_jax.ptq.ledger import JournalLedger
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.ptq.states import States
from mquant_jax.ptq.tune import Recomputing, _shown
from mquant_jax.ptq.tune_block import relative_error
from mquant_jax.recipe import Tuning
from tests.helpers import forward, golden_model, golden_qwen2_vl, mostly_slow, relative

PLAIN = PRESETS["w4a8"]
TUNED = dataclasses.replace(PLAIN, tune=Tuning(epochs=6, rate=3e-3))
BLOCKS = dataclasses.replace(PLAIN, tune=Tuning(epochs=6, rate=3e-3, form="block"))


@pytest.fixture(scope="module")
def source():
    """The float model, its config and tensors with an untied head, and the batch."""
    model, config, inputs, _ = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    return model, *untied(config, get_params(model)), batch


@pytest.fixture(scope="module")
def made(source):
    """The batch; then tensors, report and model of both recipes."""
    _, config, params, batch = source
    out = [batch]
    for recipe in (PLAIN, TUNED):
        tensors, report = quantize_params(FAMILY, config, recipe, params, batch)
        built = abstract_model(FAMILY, config, recipe)
        set_params(built, dict(tensors))
        out.append((tensors, report, built))
    return out


def test_divergence_falls_and_only_scales_and_gains_move(made) -> None:
    _, (before, _, _), (after, report, _) = made
    assert report["tuning"]["last"] < 0.8 * report["tuning"]["first"]
    moved = set()
    for name, old in before.items():
        new = after[name]
        if isinstance(old, QWeight):
            np.testing.assert_array_equal(new.values, old.values)
            old, new = old.scale, new.scale
        if not np.array_equal(old, new):
            assert (np.asarray(new) * np.asarray(old) > 0).all()
            moved.add(name)
    assert moved and all(name.startswith("language/") for name in moved)
    kinds = {name.rsplit("/", 1)[-1] for name in moved}
    assert kinds == {"kernel", "act_scale", "weight"}


def test_simulation_is_what_the_integers_compute(made) -> None:
    batch, _, (_, _, model) = made
    expected = forward(model, batch)
    for _, node in nnx.iter_graph(model.language):
        if isinstance(node, ActQuant):
            node.simulated = True
    real = batch.order >= 0
    assert relative(forward(model, batch)[real], expected[real]) < 1e-4


def test_gradients_pass_the_rounding_and_stop_at_the_clip() -> None:
    x, scale = jnp.asarray([0.26, -3.4, 900.0]), jnp.float32(0.5)
    got = simulate_static(x, scale).dequantize()
    np.testing.assert_allclose(got, quantize_static(x, scale).dequantize())
    slope = jax.grad(lambda a: simulate_static(a, scale).dequantize().sum())(x)
    np.testing.assert_allclose(slope, [1, 1, 0])
    by_scale = jax.jacobian(lambda x, s: simulate_static(x, s).dequantize(), argnums=1)(x, scale)
    np.testing.assert_allclose(by_scale, [1 - 0.52, -7 + 6.8, 127], atol=1e-5)


@pytest.fixture(scope="module")
def blocks(source):
    """Tensors and report of block-wise learning, which never builds a whole model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("set_params", "float_model", "tune"):
            patch.delattr(pipeline, name)
        return quantize_params(FAMILY, *arguments(source, BLOCKS))


def arguments(source, recipe):
    _, config, params, batch = source
    return config, recipe, params, batch


def test_blocks_come_closer_to_the_float_model(source, made, blocks) -> None:
    model, config, _, batch = source
    _, (plain, _, before), _ = made
    tensors, report = blocks
    layers = [f"language/layers/{i}" for i in range(config.language.num_layers)]
    assert list(report["tuning"]) == layers
    assert all(r["last"] < 0.95 * r["first"] for r in report["tuning"].values())
    after = abstract_model(FAMILY, config, BLOCKS)
    set_params(after, dict(tensors))
    real, expected = batch.order >= 0, forward(model, batch)
    errors = [relative(forward(m, batch)[real], expected[real]) for m in (before, after)]
    assert errors[1] < 0.9 * errors[0]
    # Later blocks are rounded for changed inputs; in the first one only scales and gains move.
    for name, value in tensors.items():
        if not name.startswith("language/"):
            jax.tree.map(np.testing.assert_array_equal, value, plain[name])
        if name.startswith("language/layers/0/") and isinstance(value, QWeight):
            np.testing.assert_array_equal(value.values, plain[name].values)
            assert (value.scale != plain[name].scale).any()


class Stopped(Exception):
    """Simulates a kill."""


def test_an_interrupted_conversion_learns_the_same(source, blocks, tmp_path) -> None:
    kept: dict[str, Any] = {}

    def convert(stop: str | None) -> list[str]:
        """Convert until the part ``stop``; return the parts written before it."""
        parts: list[str] = []

        def sink(part, tensors):
            if part == stop:
                raise Stopped
            parts.append(part)
            kept.update({name: pipeline.in_memory(value) for name, value in tensors.items()})
            return {}

        ledger = JournalLedger(Journal(tmp_path / "journal"), {})
        given = {"states": States(tmp_path / "states", budget=0), "ledger": ledger}
        job = pipeline.Conversion(FAMILY, *arguments(source, BLOCKS), **given)
        with contextlib.suppress(Stopped):
            job.run(sink)
        return parts

    assert "language.layers.0" in convert("language.layers.1")
    assert convert("language.layers.2") == ["language.layers.1"]
    assert convert(None)[0] == "language.layers.2"
    assert kept.keys() == blocks[0].keys()
    for name, value in blocks[0].items():
        jax.tree.map(np.testing.assert_array_equal, kept[name], value)


@pytest.mark.parametrize("form", mostly_slow(["model", "block"], "block"))
def test_bfloat16_weights_learn_and_stay(source, form) -> None:
    model, config, params, batch = source
    narrow = {k: np.asarray(v).astype(jnp.bfloat16) for k, v in params.items()}
    recipe = dataclasses.replace(TUNED, tune=Tuning(epochs=2, form=form))
    tensors, report = quantize_params(FAMILY, config, recipe, narrow, batch)
    learned = [report["tuning"]] if form == "model" else report["tuning"].values()
    assert all(r["last"] < r["first"] for r in learned)
    floats = {k: v for k, v in tensors.items() if k in narrow and not isinstance(v, QWeight)}
    assert {v.dtype for v in floats.values()} == {np.dtype(jnp.bfloat16)}


def test_the_error_is_relative_and_leaves_out_padding() -> None:
    theirs = jnp.asarray([[[3.0, 4.0], [300.0, 400.0], [1.0, 0.0]]])
    ours = theirs * jnp.asarray([1.1, 1.2, 9.0])[:, None]
    error = relative_error(ours, theirs, jnp.asarray([[0, 1, -1]]))
    np.testing.assert_allclose(error, (0.01 + 0.04) / 2, rtol=1e-4)


def test_deep_features_reach_the_student() -> None:
    """The student gets the features that a tapped tower adds after the first layers, for chunks
    with and without pictures."""
    family, model, config, inputs, _ = golden_model("qwen3_vl/public")
    batch = family.reference_batch(config, inputs)
    text = family.collate(config, [family.example_prompt(config, 9, 0)])
    embedded, added, target, tokens = _shown(model, model, [batch, text])
    assert added.shape == (3, *embedded.shape) and np.asarray(added)[:2, :2].any()
    got = model.language(
        embedded, tokens.positions, tokens.order, tokens.token_class, Recomputing(), added=added
    )
    real = np.asarray(tokens.token_class) >= 0
    assert relative(np.asarray(got)[real], np.asarray(target)[real]) < 1e-5
