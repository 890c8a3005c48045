"""The plan of a conversion predicts the result, and takes only seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from flax import nnx

from benchmarks.aot.sizes import MODELS
from mquant_jax.checkpoint.manifest import load_manifest
from mquant_jax.commands.convert import main
from mquant_jax.layer_plan import layer_plan, stored_bytes
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.numerics import QWeight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.cost import CONSTANTS, Data, cost
from mquant_jax.recipe import Recipe, Section, Split
from mquant_jax.samples import DEMO_ASSETS
from tests.helpers import fails, golden
from tests.hf_folders import GOLDENS
from tests.models.test_cogvlm2_sizes import PUBLISHED as COGVLM2

QWEN2_VL_72B = MODELS["qwen2_vl-7b"] | {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8,
    "vision_config": MODELS["qwen2_vl-7b"]["vision_config"] | {"hidden_size": 8192},
}  # fmt: skip
QUICK = {"weights": {"method": "rtn"}, "language": {"w_bits": 4, "activations": "dynamic"},
         "vision": {"w_bits": 8}, "head": {"w_bits": 8}, "embedding": {"w_bits": 8}}  # fmt: skip


def plan_of(hf: dict, recipe: Recipe):
    family = family_for(hf)
    return layer_plan(family, family.config_from_hf(hf), recipe, stored_bytes(hf))


def folder_of(path: Path, hf: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf))
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"rotate": True, "split": {"criterion": "paper"}}, marks=pytest.mark.slow)],
)
def test_the_plan_is_what_a_conversion_makes(tmp_path, capsys, changes) -> None:
    rules = [["language/layers/*/o_proj", {"group_size": 32}], ["vision/merger/*", {"w_bits": 4}]]
    (tmp_path / "recipe.json").write_text(json.dumps(QUICK | changes | {"rules": rules}))
    options = ["--recipe", str(tmp_path / "recipe.json"), "--json"]
    source, dst = str(DEMO_ASSETS / "model"), tmp_path / "dst"
    assert main([source, "--dry-run", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main([source, str(dst), *options]) == 0
    made = json.loads(capsys.readouterr().out)
    tensors = load_manifest(dst)["tensors"]
    sizes: dict[str, int] = {}
    for entry in tensors.values():
        part = ".".join("*" if p.isdigit() else p for p in entry["part"].split("."))
        sizes[part] = sizes.get(part, 0) + entry["bytes"]
    assert {p["part"]: p["bytes_after"] for p in plan["parts"]} == sizes
    assert plan["bytes_after"] == made["total_bytes"]
    assert made["recipe"] == plan["recipe"]
    weights = (DEMO_ASSETS / "model" / "model.safetensors").stat().st_size
    assert 0 < weights - plan["bytes_before"] < 32768  # the header


@pytest.mark.parametrize("preset", ["float", "w4a8", "w8a8"])
def test_specs_are_those_of_the_tensors(preset) -> None:
    hf, _, _ = golden("qwen2_vl", "public")
    recipe = dataclasses.replace(PRESETS[preset], split=Split("paper"))
    plan, family = plan_of(hf, recipe), family_for(hf)
    params = abstract_params(family.build(plan.config, recipe, "float32", nnx.Rngs(0)))
    specs = {layer.path: layer for layer in plan.layers}
    for name, value in params.items():
        if not name.endswith("/kernel"):
            continue
        spec = specs.pop(name.removesuffix("/kernel"))
        quantised = isinstance(value, QWeight)
        assert spec.w_bits == (value.bits if quantised else 16)
        shape = (value.out_features, value.in_features) if quantised else value.shape
        assert (spec.out_features, spec.in_features) == shape
        assert (f"{spec.point}/act_scale" in params) == (spec.activations == "static")
        assert (f"{spec.path}/split/index" in params) == (spec.protection == "split")
    assert set(specs) == {"language/embedding"}


def test_rotations_are_named() -> None:
    hf, _, _ = golden("qwen2_vl", "public")
    rotation = {x.path: x.rotation for x in plan_of(hf, PRESETS["w4a8"]).layers}
    assert rotation["language/layers/1/down_proj"] == rotation["vision/merger/fc2"] == "online"
    for path in ("language/layers/1/q_proj", "language/head", "language/embedding",
                 "vision/patch_embed/proj"):  # fmt: skip
        assert rotation[path] == "folded", path
    assert {x.rotation for x in plan_of(hf, PRESETS["w4a8-rtn"]).layers} == {"none"}


@pytest.mark.parametrize(
    ("hf", "before", "most"),
    [
        (MODELS["qwen2_vl-2b"], 4.418e9, 6e9),
        (MODELS["qwen2_vl-7b"], 16.58e9, 12e9),
        (COGVLM2, 39.0e9, 24e9),
        (QWEN2_VL_72B, 146.8e9, 24e9),
    ],
)
def test_published_sizes(tmp_path, capsys, hf, before, most) -> None:
    """config.json is enough to plan, without computing tensors."""
    folder = folder_of(tmp_path / "model", hf)
    assert main([str(folder), "--recipe", "w4a8", "--dry-run", "--json", "--device", "v5p"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_before"] == pytest.approx(before, rel=0.02)
    assert 0.25 < plan["bytes_after"] / plan["bytes_before"] < 0.45
    assert plan["memory"]["least_bytes"] < most
    assert plan["seconds"] > 0 and plan["devices"][0]["weights"] > 0.25 * before


def test_memory_depends_on_one_part_and_not_on_depth() -> None:
    def peak(layers: int) -> int:
        hf = MODELS["qwen2_vl-7b"] | {"num_hidden_layers": layers}
        return cost(plan_of(hf, PRESETS["w4a8"]), Data(), 100.0).peak_bytes

    assert peak(2) == peak(4) == peak(28)


def test_cost_grows_with_what_is_asked() -> None:
    hf = MODELS["qwen2_vl-2b"]
    plans = {name: cost(plan_of(hf, PRESETS[name]), Data(), 100.0) for name in PRESETS}
    assert plans["float"].seconds < plans["w4a8-rtn"].seconds < plans["w4a8"].seconds
    assert plans["float"].peak_bytes < plans["w4a8"].peak_bytes
    base = dataclasses.replace(CONSTANTS, base=CONSTANTS.base + 1000)
    more = cost(plan_of(hf, PRESETS["w4a8"]), Data(), 100.0, base)
    assert more.peak_bytes == plans["w4a8"].peak_bytes + 1000


def test_errors_come_before_the_hours(tmp_path, capsys) -> None:
    folder = str(folder_of(tmp_path / "model", MODELS["qwen2_vl-2b"]))
    bad = tmp_path / "bad.json"
    for recipe, message in (
        ({"language": {"w_bits": 4, "group_size": 100}}, "group_size 100 does not divide"),
        ({"rules": [["language/layers/*/mlp", {"w_bits": 4}]]}, "matches no layer"),
        ({"rules": [["language/layers/28/*", {"w_bits": 4}]]}, "matches no layer"),
    ):
        bad.write_text(json.dumps(recipe))
        fails(message, lambda: main([folder, "--dry-run", "--recipe", str(bad)]))
    fails("invalid choice: 'v9'", lambda: main([folder, "--dry-run", "--device", "v9"]))
    fails("no such file", lambda: main([folder, "--dry-run", "--calibration", "none.jsonl"]))
    fails("DST is missing", lambda: main([folder]))
    fails("needs --dry-run", lambda: main([folder, "dst", "--device", "v5e"]))
    fails("no such folder", lambda: main([str(tmp_path / "none"), "--dry-run"]))
    assert capsys.readouterr().out == ""


def test_the_table_names_every_part(capsys) -> None:
    assert main([str(GOLDENS / "public"), "--recipe", "w4a8", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for word in ("language.layers.* x3", "vision.merger", "int4", "int8", "online", "MiB before",
                 "memory: ", "time: about"):  # fmt: skip
        assert word in text


def test_an_embedding_of_eight_bits_halves_the_table() -> None:
    plan = plan_of(MODELS["qwen2_vl-7b"], Recipe(embedding=Section(8)))
    table = next(x for x in plan.layers if x.path == "language/embedding")
    assert table.w_bits == 8 and table.point is None and table.activations == "none"
    assert table.bytes_after == pytest.approx(table.bytes_before / 2, rel=0.002)
