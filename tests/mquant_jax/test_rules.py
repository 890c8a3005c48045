"""Rules of a recipe: matching layers, errors, and effects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.base import abstract_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import dense_layers, get_params
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS, resolve_recipe
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.recipe import Recipe, Section, Weights
from mquant_jax.sections import Rule, kind_of
from tests.helpers import (
    GOLDENS,
    fails,
    golden,
    golden_qwen2_vl,
    mostly_slow,
    quantised,
    relative,
)

W4A8 = PRESETS["w4a8-rtn"]
DOWN = {f"language/layers/{i}/down_proj" for i in range(3)}
CASES = {
    "cogvlm2": "public",
    "glm4v": "public",
    "internvl": "public",
    "llama": "public",
    "minicpmv2_6": "public",
    "qwen_vl": "public",
    "qwen2_5_vl": "public",
    "qwen2_vl": "public",
    "qwen3_vl": "public",
}


def ruled(*rules, base: Recipe = W4A8) -> Recipe:
    return dataclasses.replace(base, rules=rules)


def layers_of(recipe: Recipe, family: str = "qwen2_vl"):
    hf, _, _ = golden(family, CASES[family])
    brand = family_for(hf)
    return dense_layers(abstract_model(brand, brand.config_from_hf(hf), recipe))


def bits(layers) -> dict[str, int]:
    return {k: v.bits if isinstance(v, QWeight) else 16 for k, v in layers.items()}


@pytest.mark.parametrize(
    ("pattern", "reached"),
    [
        ("language/layers/*/down_proj", DOWN),
        ("language/layers/down_proj", DOWN),
        ("*/down_proj", DOWN),
        ("vision/merger/*", {"vision/merger/fc1", "vision/merger/fc2"}),
        ("vision/merger/fc[2]", {"vision/merger/fc2"}),
        ("language/head", {"language/head"}),
        ("language/embedding", {"language/embedding"}),
        ("vision/patch_embed/proj", {"vision/patch_embed/proj"}),
    ],
)
def test_a_pattern_reaches_the_layers_that_it_names(pattern, reached) -> None:
    base = bits(layers_of(Recipe()))
    got = bits(layers_of(ruled((pattern, {"w_bits": 8}), base=Recipe())))
    assert {path for path in got if got[path] != base[path]} == reached
    assert all(got[path] == 8 for path in reached)


def test_the_first_match_wins_and_other_fields_stay() -> None:
    recipe = ruled(
        ("language/layers/*/o_proj", {"w_bits": 8}),
        ("language/layers/*", {"group_size": 16}),
    )
    assert recipe.section_for("language/layers/7/o_proj") == Section(8, None, "static")
    assert recipe.section_for("language/layers/7/q_proj") == Section(4, 16, "static")
    assert recipe.section_for("language/head") == W4A8.head


def subsets(names: Iterable[str]) -> Iterator[list[str]]:
    """A few subsets such that every name is in one, and any two names differ in one."""
    numbered = list(enumerate(sorted(names), 1))
    for bit in range(len(numbered).bit_length()):
        yield [name for i, name in numbered if i >> bit & 1]


@pytest.mark.parametrize(
    "family", mostly_slow(CASES, "qwen2_vl", "cogvlm2", "minicpmv2_6", "qwen3_vl")
)
def test_every_layer_of_every_family_can_be_named(family) -> None:
    """The modules take their specs from the plan."""
    kinds = {kind_of(path) for path in layers_of(Recipe(), family)}
    recipes = [
        Recipe(**{name: Section(8) for name in names})
        for names in subsets(("vision", "connector", "language", "head", "embedding"))
    ]
    for named in subsets(kinds):
        recipes.append(ruled(*((kind, {"w_bits": 8}) for kind in named), base=Recipe()))
    for recipe in recipes:
        for path, found in bits(layers_of(recipe, family)).items():
            assert found == recipe.section_for(path).w_bits, path


def test_a_rule_that_matches_nothing_names_near_misses() -> None:
    recipe = ruled(("language/layers/*/donw_proj", {"w_bits": 8}))
    fails(r"rule 'language/layers/\*/donw_proj' matches no layer.*language/layers/\*/down_proj",
          lambda: layers_of(recipe))  # fmt: skip
    fails(r"'vision/merger/fc3' matches no layer.*vision/merger/fc[12]",
          lambda: layers_of(ruled(("vision/merger/fc3", {"w_bits": 8}))))  # fmt: skip


def test_readers_of_one_input_must_agree_on_its_activations() -> None:
    one = ruled(("language/layers/*/q_proj", {"activations": "dynamic"}))
    fails(r"that read language/layers/0/attn_in .*q_proj dynamic, k_proj static",
          lambda: layers_of(one))  # fmt: skip
    everyone = ruled(("language/layers/*/[qkv]_proj", {"activations": "dynamic"}))
    assert bits(layers_of(everyone)) == bits(layers_of(W4A8))


def test_a_tied_table_has_the_path_of_the_head() -> None:
    hf, _, _ = golden("qwen2_vl", "public")
    config = FAMILY.config_from_hf(hf)
    tied = dataclasses.replace(config.language, tied_head=True)
    config = dataclasses.replace(config, language=tied)
    recipe = ruled(("language/head", {"w_bits": 8}), base=Recipe())
    assert bits(dense_layers(abstract_model(FAMILY, config, recipe)))["language/head"] == 8
    recipe = ruled(("language/embedding", {"w_bits": 8}), base=Recipe())
    fails("language/embedding.*language/head", lambda: abstract_model(FAMILY, config, recipe))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["language/*", {"bits": 8}]], r"rules\[0\] \(language/\*\): unknown key 'bits'.*w_bits"),
        ([["x", {"w_bits": 3}]], r"rules\[0\] \(x\)\.w_bits: 3 is not one of 4, 8, 16"),
        ([["x", {}]], r"rules\[0\]: expected \[pattern, changes\]"),
        ([["x"]], r"rules\[0\]: expected \[pattern, changes\]"),
        ([["", {"w_bits": 8}]], r"rules\[0\]: expected \[pattern, changes\]"),
        ([["x", 4]], r"rules\[0\] \(x\): expected a JSON object, found int"),
        ([4], r"rules\[0\]: expected \[pattern, changes\]"),
        ({"language/*": {"w_bits": 8}}, r"rules: expected a list"),
    ],
)
def test_malformed_rules(rules, message) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_json({"rules": rules})


def test_json_both_ways() -> None:
    recipe = ruled(
        ("language/layers/*/down_proj", {"w_bits": 8, "dynamic_points": ["mlp_hidden"]}),
        ("language/head", {"group_size": None}),
    )
    data = json.loads(json.dumps(recipe.to_json()))
    assert data["version"] == Recipe.version
    assert data["rules"][1] == ["language/head", {"group_size": None}]
    assert Recipe.from_json(data) == recipe and hash(Recipe.from_json(data)) == hash(recipe)
    spelt = {"pattern": "language/head", "changes": {"group_size": None}}
    assert Recipe.from_json({"rules": [spelt]}).rules == (Rule.of(spelt),) == recipe.rules[1:]


def test_older_recipes_still_load() -> None:
    stored = resolve_recipe(str(GOLDENS / "recipe_v1.json"))
    preset = PRESETS["w4a8-tuned"]
    assert stored == dataclasses.replace(preset, embedding=Section())
    stored = json.loads((GOLDENS / "checkpoint_v2" / "mquant.json").read_text())["recipe"]
    recipe = Recipe.from_json(stored)
    assert recipe.rules == () and recipe.embedding == Section()


@pytest.mark.parametrize("version", [0, 3, "2", True, None])
def test_recipes_of_another_version(version) -> None:
    with pytest.raises(UserError, match=r"recipe\.version: .* is not one of 1 to 2; a newer"):
        Recipe.from_json({"version": version})


def test_what_a_rule_may_need() -> None:
    static = ruled(("language/layers/*", {"activations": "static"}), base=Recipe(sink_class=True))
    assert static.needs_calibration and static.changes_weights and static.marks_sinks
    narrow = ruled(("language/layers/*", {"w_bits": 8}), base=Recipe())
    assert not narrow.needs_calibration and narrow.changes_weights
    by_gptq = dataclasses.replace(narrow, weights=Weights(method="gptq"))
    assert by_gptq.needs_calibration
    table = Recipe(embedding=Section(8), weights=Weights(method="gptq"))
    assert table.changes_weights and not table.needs_calibration


def test_layers_behind_one_point_are_rounded_each_to_its_own_bits() -> None:
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch, real = FAMILY.reference_batch(config, inputs), inputs["attention_mask"] == 1
    base = dataclasses.replace(PRESETS["w4a8"], balance=False, rotate=False)
    recipe = ruled(
        ("language/layers/*/v_proj", {"w_bits": 8}),
        ("language/layers/*/k_proj", {"group_size": 8}),
        ("vision/layers/*/fc1", {"w_bits": 16}),
        base=base,
    )
    params, report = quantize_params(FAMILY, config, recipe, get_params(model), batch)
    q, k, v = (params[f"language/layers/1/{n}_proj/kernel"] for n in "qkv")
    assert (q.bits, k.bits, v.bits) == (4, 4, 8)
    assert q.groups == v.groups == 1 and k.groups == k.in_features // 8
    assert isinstance(params["vision/layers/0/fc1/kernel"], np.ndarray)
    errors = report["weights"]
    assert errors["language/layers/1/v_proj/kernel"] < 0.02
    assert "vision/layers/0/fc1/kernel" not in errors
    logits = quantised(FAMILY, config, recipe, params, batch)[real]
    assert relative(logits, outputs["logits"][real]) < 0.5


def test_calibration_sees_the_rounded_rows_of_the_embedding() -> None:
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch, real = FAMILY.reference_batch(config, inputs), inputs["attention_mask"] == 1
    floats = get_params(model)
    recipe = Recipe(language=Section(8, None, "static"), embedding=Section(4))
    params, report = quantize_params(FAMILY, config, recipe, floats, batch)
    table = params["language/embedding"]
    assert table.bits == 4 and table.groups == 1
    rounded = dict(floats) | {"language/embedding": np.asarray(table.dequantize())}
    plain = dataclasses.replace(recipe, embedding=Section())
    expected, _ = quantize_params(FAMILY, config, plain, rounded, batch)
    for name, value in expected.items():
        if name.endswith("act_scale"):
            np.testing.assert_array_equal(params[name], value)
    got = quantised(FAMILY, config, recipe, params, batch)[real]
    assert relative(got, quantised(FAMILY, config, plain, expected, batch)[real]) < 1e-5
    eight = dataclasses.replace(recipe, embedding=Section(8))
    assert report["weights"]["language/embedding"] > 0.05
    params, report = quantize_params(FAMILY, config, eight, floats, batch)
    assert report["weights"]["language/embedding"] < 0.01
    logits = quantised(FAMILY, config, eight, params, batch)[real]
    assert relative(logits, outputs["logits"][real]) < 0.1
