"""Towers whose layers are quantised differently: one stack per run of equal layers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import mquant_jax as mq
from mquant_jax.commands.inspect import layer_paths
from mquant_jax.layer_plan import layer_plan
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import dense_layers, get_params, set_params
from mquant_jax.nn.stack import Segments, num_layers, segments
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Recipe, Tuning
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, read_samples
from tests.helpers import forward, golden, golden_model, mostly_slow, relative

W4A8 = PRESETS["w4a8"]
ROUNDING = 1e-4
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "cogvlm2", "internvl", "llava", "llama")


def ruled(*rules, base: Recipe = W4A8) -> Recipe:
    return dataclasses.replace(base, rules=rules)


def widths(name: str, hidden: int) -> tuple[str, dict[str, int]]:
    """A rule that splits a tower without changing results: one group spans all columns."""
    return name, {"group_size": hidden}


def split_like(model: nnx.Module, family: str, recipe: Recipe) -> nnx.Module:
    """The same tensors in a model whose towers are split after layer 0 and before the last."""
    brand = family_for(golden(family, "public")[0])
    params, rules = get_params(model), []
    for tower in ("language", "vision"):
        kernels = {n: v for n, v in params.items() if n.startswith(f"{tower}/layers/")
                   and isinstance(v, QWeight)}  # fmt: skip
        depth = len({n.split("/")[2] for n in kernels})
        for i in {0, depth - 1} if depth > 2 else range(depth - 1):
            name = next(n for n in kernels if n.startswith(f"{tower}/layers/{i}/"))
            rules.append(widths(name.removesuffix("/kernel"), params[name].in_features))
    other = abstract_model(brand, model.config, ruled(*rules, base=recipe))
    set_params(other, dict(params))
    return other


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "qwen2_vl", "qwen3_vl", "cogvlm2"))
def test_segments_compute_what_one_stack_computes(family) -> None:
    """Tower, taps, experts, windows, prefill, cache and decoding agree, up to rounding: XLA fuses
    loops of one iteration differently."""
    _, model, config, inputs, _ = golden_model(f"{family}/public")
    brand = family_for(golden(family, "public")[0])
    # Float activations, because one int8 step would be far more than rounding.
    recipe = dataclasses.replace(PRESETS["w4a16"], weights=PRESETS["w4a8-rtn"].weights)
    made, _ = quantize_params(brand, config, recipe, get_params(model))
    whole = abstract_model(brand, config, recipe)
    set_params(whole, dict(made))
    cut = split_like(whole, family, recipe)
    assert isinstance(cut.language.layers, Segments)
    assert num_layers(cut.language.layers) == num_layers(whole.language.layers)
    assert jax.tree.all(jax.tree.map(np.array_equal, get_params(whole), get_params(cut)))
    batch = brand.reference_batch(config, inputs)
    assert relative(forward(cut, batch), forward(whole, batch)) < ROUNDING

    def steps(model):
        rows, width = batch.order.shape
        logits, state = jax.jit(mq.prefill, static_argnums=2)(model, batch, width + 2)
        token = np.asarray(logits).argmax(-1).astype(np.int32)
        return logits, jax.jit(mq.decode)(model, token, state)[0]

    for a, b in zip(steps(cut), steps(whole), strict=True):
        assert relative(a, b) < ROUNDING


def test_a_rule_may_name_one_layer() -> None:
    hf, _, _ = golden("qwen2_vl", "public")
    brand = family_for(hf)
    config = brand.config_from_hf(hf)
    recipe = ruled(
        ("language/layers/1/down_proj", {"w_bits": 8}),
        ("vision/layers/0/*", {"activations": "dynamic"}),
    )
    model = abstract_model(brand, config, recipe)
    assert [first for first, _ in segments(model.language.layers)] == [0, 1, 2]
    assert [first for first, _ in segments(model.vision.layers)] == [0, 1]
    same = ruled(("language/layers/1/down_proj", {"w_bits": 4}))  # the preset's bits
    assert not isinstance(abstract_model(brand, config, same).language.layers, Segments)
    plan = {layer.path: layer for layer in layer_plan(brand, config, recipe).layers}
    found = [plan[f"language/layers/{i}/down_proj"] for i in range(3)]
    assert [layer.w_bits for layer in found] == [4, 8, 4]
    assert found[1].bytes_after > 1.8 * found[0].bytes_after
    modes = [plan[f"vision/layers/{i}/fc1"].activations for i in range(2)]
    assert modes == ["dynamic", "static"]
    assert plan["vision/layers/0/fc1"].point == "vision/layers/0/mlp_in"
    rows = {(r["layer"], r["weights"]): r["count"] for r in layer_paths(model, recipe)}
    assert rows["language/layers/*/down_proj", "int8"] == 1
    assert rows["language/layers/*/down_proj", "int4"] == 2


@pytest.mark.parametrize("tune", mostly_slow([None, "block", "model"], None))
def test_quantising_such_a_model(tune) -> None:
    brand, model, config, inputs, _ = golden_model("qwen2_vl/public")
    batch = brand.reference_batch(config, inputs)
    config, params = untied(config, get_params(model))
    expected = np.asarray(forward(model, batch))
    base = dataclasses.replace(W4A8, balance=False)
    if tune:
        base = dataclasses.replace(base, tune=Tuning(epochs=1, form=tune))
    real, errors = np.asarray(batch.token_class) >= 0, []
    for rules in ((), (("language/layers/[02]/*", {"w_bits": 8}), ("vision/*", {"w_bits": 8}))):
        recipe = ruled(*rules, base=base)
        made, report = quantize_params(brand, config, recipe, params, batch)
        for name, value in made.items():
            if isinstance(value, QWeight):
                path = name.removesuffix("/kernel")
                assert value.bits == recipe.section_for(path).w_bits, name
        assert len(report["points"]) == len({n for n in made if n.endswith("act_scale")})
        other = abstract_model(brand, config, recipe)
        set_params(other, dict(made))
        errors.append(relative(np.asarray(forward(other, batch))[real], expected[real]))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_a_checkpoint_of_such_a_model(tmp_path) -> None:
    """Such a checkpoint can be converted, loaded, and used by ``generate`` and the engine."""
    recipe = ruled(
        ("language/layers/0/*", {"w_bits": 8}), ("vision/layers/[23]/*", {"w_bits": 8}),
        base=PRESETS["w4a8-rtn"],
    )  # fmt: skip
    convert(DEMO_ASSETS / "model", tmp_path / "dst", recipe, None)
    model = mq.load(tmp_path / "dst")
    assert [first for first, _ in segments(model.module.language.layers)] == [0, 1]
    assert [first for first, _ in segments(model.module.vision.layers)] == [0, 2]
    for path, value in dense_layers(model.module).items():
        quantised = isinstance(value, QWeight)
        assert (value.bits if quantised else 16) == recipe.section_for(path).w_bits, path
    sample = read_samples(BUNDLED_HELDOUT, 1)[0]
    prompt = model.processor.prompt(sample.question, sample.images)
    answer = model.generate(images=[sample.images], prompt=[sample.question], max_new_tokens=8)
    with mq.Engine(model, slots=2, context=256) as engine:
        served = engine.submit(prompt, mq.RequestOptions(max_new_tokens=8)).result()
    assert served.text == answer[0]
