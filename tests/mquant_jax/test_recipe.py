"""Recipes: JSON round trips, and errors that name the key."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mquant_jax.errors import UserError
from mquant_jax.presets import PRESETS, resolve_recipe
from mquant_jax.recipe import SECTIONS, Recipe, Section, Weights


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name, tmp_path) -> None:
    recipe = PRESETS[name]
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_json()))
    assert resolve_recipe(str(path)) == resolve_recipe(name) == recipe


def test_group_sizes_round_trip() -> None:
    recipe = dataclasses.replace(PRESETS["w4a8"], language=Section(4, 128, "static"))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_missing_keys_take_their_defaults() -> None:
    assert Recipe.from_json({}) == Recipe()
    recipe = Recipe.from_json({"language": {"w_bits": 4}})
    assert recipe.language == Section(4) and recipe.vision == Section()
    assert Recipe.from_json({"tune": {"epochs": 2}}).tune.form == "model"  # an older recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"langauge": {}}, r"unknown key 'langauge'; known keys: .*language"),
        ({"language": {"bits": 4}}, r"recipe\.language: unknown key 'bits'.*w_bits"),
        ({"language": {"w_bits": 3}}, r"recipe\.language\.w_bits: 3 is not one of 4, 8, 16"),
        ({"language": {"activations": "int8"}}, r"activations: 'int8' is not one of 'static'"),
        ({"calibration": {"observer": "max"}}, r"calibration\.observer: 'max'"),
        ({"calibration": {"max_samples": -1}}, r"max_samples: expected int, found -1"),
        ({"calibration": {"max_samples": True}}, r"max_samples: expected int, found True"),
        ({"language": {"group_size": 0}}, r"group_size: expected a positive integer or null"),
        ({"language": {"group_size": "64"}}, r"group_size: expected a positive integer or null"),
        ({"weights": {"clip": 1}}, r"weights\.clip: expected bool, found 1"),
        ({"weights": {"asymmetry": "1"}}, r"asymmetry: expected a number, zero or more"),
        ({"language": {"dynamic_points": "mlp"}}, r"dynamic_points: expected a list of names"),
        ({"calibration": {"headroom": 1e30}}, r"headroom: expected 0.5 to 10, found 1e\+30"),
        ({"calibration": {"headroom": 0}}, r"headroom: expected 0.5 to 10, found 0"),
        ({"calibration": {"headroom": float("nan")}}, r"headroom: expected a number"),
        ({"calibration": {"headroom": 10**400}}, r"headroom: expected a number"),
        ({"calibration": {"max_samples": 0}}, r"max_samples: expected 1 to"),
        ({"weights": {"visual_weight": 1e30}}, r"visual_weight: expected 0 to 1000"),
        ({"weights": {"sink_weight": float("inf")}}, r"sink_weight: expected a number"),
        ({"weights": {"asymmetry": 1.5}}, r"asymmetry: expected 0 to 1"),
        ({"weights": {"refit": 10**9}}, r"refit: expected 0 to 100"),
        ({"tune": {"rate": 1e30}}, r"rate: expected 0 to 1"),
        ({"tune": {"act_rate": 7}}, r"act_rate: expected 0 to 1"),
        ({"tune": {"epochs": 10**9}}, r"epochs: expected 0 to 1000"),
        ({"tune": {"form": "layer"}}, r"tune.form: .layer. is not one of 'model', 'block'"),
        ({"prefix_sinks": 10**6}, r"prefix_sinks: expected 0 to 64"),
        ({"seed": 2**64}, r"seed: expected 0 to"),
        ({"seed": 10**5000}, r"seed: expected 0 to"),
        ({"language": {"group_size": 2**40}}, r"group_size: expected 1 to"),
        ({"language": {"w_bits": 4.0}}, r"w_bits: 4.0 is not one of"),
        ({"language": {"w_bits": [[]]}}, r"w_bits: \[\[\]\] is not one of"),
        ({"language": {"dynamic_points": [1]}}, r"dynamic_points: expected a list of names"),
        ({"name": None}, r"name: expected str, found None"),
        ({"language": 4}, r"recipe\.language: expected a JSON object, found int"),
        ([], r"recipe: expected a JSON object, found list"),
    ],
)
def test_errors_name_the_key(data, message) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_json(data)


def test_files_that_are_no_recipes(tmp_path) -> None:
    with pytest.raises(UserError, match="neither a preset .*w4a8.* nor a JSON file"):
        resolve_recipe("w3a3")
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        resolve_recipe(str(path))
    path.write_text('{"x": 1}')
    with pytest.raises(UserError, match=r"bad\.json: unknown key 'x'"):
        resolve_recipe(str(path))


def test_what_needs_calibration() -> None:
    needing = {name for name, recipe in PRESETS.items() if recipe.needs_calibration}
    assert needing == set(PRESETS) - {"float"}  # for static scales or GPTQ
    assert Recipe(balance=True).needs_calibration and Recipe(balance=True).changes_weights
    dynamic = dataclasses.replace(PRESETS["w4a8-dynamic"], weights=Weights(), balance=False)
    assert not dynamic.needs_calibration and dynamic.changes_weights
    assert not PRESETS["float"].changes_weights


def test_the_table_has_a_line_per_section() -> None:
    lines = PRESETS["w4a8-v8"].table().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(SECTIONS)
    assert lines[-1] == "weights by gptq, rotated (seed 0)"
    assert lines[1].split()[1] == "int8" and lines[3].split()[1] == "int4"
