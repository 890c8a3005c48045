"""Loading: from files to the arrays that a model runs with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mquant_jax.checkpoint.check import check_result, examine
from mquant_jax.checkpoint.manifest import content_hash
from mquant_jax.checkpoint.reader import load_params
from mquant_jax.checkpoint.writer import save
from mquant_jax.errors import CheckpointError
from mquant_jax.loading import held_bytes, load_model, outline
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import abstract_params, get_params, parameter_bytes, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.recipe import Recipe, Section
from mquant_jax.target import tracing_for
from tests.helpers import GOLDENS, cpu_target, forward, golden_model

QUANTISED = Recipe(
    name="mixed",
    vision=Section(8),
    connector=Section(4, 16),
    language=Section(4, activations="dynamic"),
    head=Section(8),
)


def _convert(dst, case, recipe, change=None, **options):
    """Convert a golden without calibration."""
    folder = GOLDENS / case
    hf = json.loads((folder / "config.json").read_text())
    family = family_for(hf, "config.json")
    config = family.config_from_hf(hf)
    source = load_file(folder / "model.safetensors")
    params = {r.dst: r.apply(source[r.src]) for r in family.weight_rules(config)}
    params = params if change is None else change(params)
    if recipe.changes_weights:
        params, _ = quantize_params(family, config, recipe, params)
    tied = config.language.tied_head
    save(dst, params, family=family.name, hf_config=hf, recipe=recipe, tied_head=tied, **options)
    return family, config


def _equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("keep_packed", [None, True, False])
def test_every_form_is_that_of_the_stored_tensors(tmp_path, parts, keep_packed):
    _convert(tmp_path / "dst", "qwen2_vl/public", QUANTISED)
    stored, _ = load_params(tmp_path / "dst")
    short = 60 if parts else 4095  # below or above every layer's number of inputs
    with tracing_for(cpu_target(short_row=short)):
        loaded = get_params(load_model(tmp_path / "dst", keep_packed=keep_packed).model)
    assert loaded.keys() == stored.keys()
    seen = set()
    for name, value in stored.items():
        got = loaded[name]
        if isinstance(value, QWeight):
            seen.add((got.bits, got.storage))
            _equal(got.unpacked(), value.unpacked())
        else:
            _equal(got, np.asarray(value, np.float32))
    four = "packed" if keep_packed else "parts" if parts and keep_packed is None else "int8"
    assert (4, four) in seen and {bits for bits, _ in seen} == {4, 8}


def test_float_types_are_converted(tmp_path):
    def narrow(params):
        kinds = (ml_dtypes.bfloat16, np.float16, np.float32)
        return {n: v.astype(kinds[i % 3]) for i, (n, v) in enumerate(params.items())}

    _convert(tmp_path / "dst", "qwen2_vl/public", Recipe(), narrow)
    stored, _ = load_params(tmp_path / "dst")
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = get_params(load_model(tmp_path / "dst", dtype).model)
        for name, value in stored.items():
            _equal(loaded[name], np.asarray(jnp.asarray(value).astype(dtype)))


def test_small_blocks_give_the_same(tmp_path, monkeypatch):
    _convert(tmp_path / "dst", "qwen2_vl/public", QUANTISED)
    whole = get_params(load_model(tmp_path / "dst").model)
    monkeypatch.setattr("mquant_jax.checkpoint.reader._BLOCK", 1000)
    pieces = get_params(load_model(tmp_path / "dst").model)
    for name, value in whole.items():
        _equal(pieces[name], value)


def test_a_flipped_bit_is_noticed_while_loading(tmp_path):
    _convert(tmp_path / "dst", "llama/public", Recipe())
    rng = np.random.default_rng(0)
    files = sorted(p for p in (tmp_path / "dst").rglob("*.safetensors"))
    for path in files:
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.integers(len(data) // 2, len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{path}: damaged: tensor language/"):
            load_model(tmp_path / "dst")
        load_model(tmp_path / "dst", verify=False)
        path.write_bytes(data)
    load_model(tmp_path / "dst")


def test_an_edited_config_is_noticed(tmp_path):
    _convert(tmp_path / "dst", "llama/public", Recipe())
    path = tmp_path / "dst" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5}))
    with pytest.raises(CheckpointError, match="config.json: was edited or damaged"):
        load_model(tmp_path / "dst")
    assert load_model(tmp_path / "dst", verify="tensors").config.language.rope_theta == 5e5


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    _convert(tmp_path / "dst", "llama/public", Recipe())
    path = tmp_path / "dst" / "mquant.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"] = QUANTISED.to_json()
    path.write_text(json.dumps(manifest | {"sha256": content_hash(manifest)}))
    with pytest.raises(CheckpointError, match=r"\d+ tensors do not fit config and recipe; "
                       "tensor language/.*of 8 bits.*, found .* of floats.*more"):  # fmt: skip
        load_model(tmp_path / "dst")


def test_format_2_gives_the_same_model(tmp_path):
    """tests/goldens/checkpoint_v2 was converted from the qwen2 golden by release 0.1.0."""
    old = tmp_path / "[o]l*d?\\"
    shutil.copytree(GOLDENS / "checkpoint_v2", old)
    loaded = load_model(old)
    recipe = Recipe.from_json(loaded.manifest["recipe"])
    family, config = _convert(tmp_path / "new", "qwen2/public", recipe)
    before, after = get_params(loaded.model), get_params(load_model(tmp_path / "new").model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        _equal(after[name], value)
    batch = family.collate(config, [family.example_prompt(config, 12, 0)])
    batch = jax.tree.map(jnp.asarray, batch)
    fresh = load_model(tmp_path / "new").model
    np.testing.assert_array_equal(forward(loaded.model, batch), forward(fresh, batch))
    assert examine(old) == []


def test_damage_of_format_2(tmp_path):
    old = tmp_path / "old"
    shutil.copytree(GOLDENS / "checkpoint_v2", old)
    path = max(
        (p for p in (old / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: differs from its hash"):
        load_model(old)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"damaged: expected {len(data)} bytes"):
        load_model(old, verify=False)
    manifest = json.loads((old / "mquant.json").read_text())
    del manifest["tensors"]
    (old / "mquant.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="tensors is missing or damaged"):
        load_model(old)


def test_held_bytes(tmp_path):
    _convert(tmp_path / "dst", "qwen2_vl/public", QUANTISED)
    model = load_model(tmp_path / "dst").model
    assert held_bytes(tmp_path / "dst") == parameter_bytes(get_params(model))


def test_a_result_that_gives_nan_is_refused(tmp_path):
    def huge(params):
        return {n: v * np.float32(1e30) if n.endswith("kernel") else v for n, v in params.items()}

    family, config = _convert(tmp_path / "dst", "llama/public", Recipe(), huge)
    with pytest.raises(CheckpointError.__base__, match="the converted model gives NaN or Inf"):
        check_result(tmp_path / "dst", family, config)


def test_short_memory_skips_the_run_and_says_so(tmp_path, monkeypatch, capsys):
    family, config = _convert(tmp_path / "dst", "llama/public", Recipe())
    monkeypatch.setattr("mquant_jax.checkpoint.check.available_memory", lambda: 1000)
    check_result(tmp_path / "dst", family, config)
    assert "was read back but not run: it needs" in capsys.readouterr().err
    path = tmp_path / "dst" / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match="config.json: was edited"):
        check_result(tmp_path / "dst", family, config)


MEASURE = """
import sys, jax
from mquant_jax.loading import load_model

def megabytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) // 1024

load_model(sys.argv[1])  # what the first load imports and starts is not counted
before = megabytes("VmRSS")
model = load_model(sys.argv[2]).model
jax.block_until_ready(jax.tree.leaves(model))
held = sum(x.nbytes for x in jax.tree.leaves(model)) >> 20
print(megabytes("VmHWM") - before, held)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_than_the_model(tmp_path):
    """Peak memory stays within 60 MB of the model's size: there is no second copy of it."""
    hf = json.loads((GOLDENS / "llama/public/config.json").read_text())
    hf |= {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 24,
           "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    family = family_for(hf, "config.json")
    config = family.config_from_hf(hf)
    recipe = Recipe(name="w4", language=Section(4))

    def filled(x):
        return np.full(x.shape, 0.01 if x.dtype.kind == "f" else 17, x.dtype)

    params = jax.tree.map(filled, abstract_params(abstract_model(family, config, recipe)))
    save(tmp_path / "dst", params, family=family.name, hf_config=hf, recipe=recipe,
         tied_head=config.language.tied_head)  # fmt: skip
    command = [sys.executable, "-c", MEASURE, str(GOLDENS / "checkpoint_v2"), str(tmp_path / "dst")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, held = map(int, out.split())
    assert held > 600 and peak < held + 60


@pytest.mark.parametrize(("target", "storage"), [("tpu", "int4"), ("gpu", "packed")])
def test_accelerators_get_the_form_of_their_kernels(tmp_path, target, storage):
    _convert(tmp_path / "dst", "qwen2_vl/public", QUANTISED)
    stored, _ = load_params(tmp_path / "dst")
    with tracing_for(target):
        loaded = get_params(load_model(tmp_path / "dst").model)
    kernels = {n: v for n, v in loaded.items() if isinstance(v, QWeight) and v.bits == 4}
    assert {v.storage for v in kernels.values() if v.groups == 1} == {storage}
    for name, value in kernels.items():
        _equal(jax.tree.map(np.asarray, value.unpacked()), stored[name].unpacked())


@pytest.mark.parametrize("short", [60, 4095])  # below or above every layer's number of inputs
def test_an_outline_has_the_shapes_of_what_is_loaded(tmp_path, short) -> None:
    _convert(tmp_path / "dst", "qwen2_vl/public", QUANTISED)

    def shapes(model):
        graph, state = nnx.split(model)
        return graph, jax.tree.map(lambda x: (x.shape, x.dtype), state)

    with tracing_for(cpu_target(short_row=short)):
        loaded, outlined = load_model(tmp_path / "dst"), outline(tmp_path / "dst")
    assert shapes(outlined.model) == shapes(loaded.model)
    for file in tmp_path.glob("dst/params/*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert outline(tmp_path / "dst").manifest == loaded.manifest  # reads no tensor
    with pytest.raises(CheckpointError, match="damaged"):
        outline(tmp_path / "dst", verify=True)


def test_an_abstract_model_is_the_caller_s_own() -> None:
    """The structure is cached between calls; changes by one caller must not affect the next."""
    family, model, config, _, _ = golden_model("qwen2_vl/public")
    first = abstract_model(family, config, Recipe())
    expected = {k: (v.shape, v.dtype) for k, v in abstract_params(first).items()}
    set_params(first, dict(get_params(model)))
    del first.language.norm
    second = abstract_model(family, config, Recipe())
    leaves = jax.tree.leaves(nnx.state(second))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert {k: (v.shape, v.dtype) for k, v in abstract_params(second).items()} == expected
