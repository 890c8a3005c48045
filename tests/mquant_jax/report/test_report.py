"""The report of a checkpoint: numbers against direct computation, page, figures."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mquant_jax.checkpoint.reader import Checkpoint, load_params
from mquant_jax.checkpoint.writer import save
from mquant_jax.cli import main
from mquant_jax.layer_plan import layer_plan, stored_bytes
from mquant_jax.models.registry import family_for
from mquant_jax.numerics import quantize_weight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.calibration_data import load_calibration
from mquant_jax.ptq.convert import convert
from mquant_jax.ptq.coverage import coverage
from mquant_jax.ptq.gptq import relative_output_error
from mquant_jax.recipe import Calibration, Recipe, Section, Weights
from mquant_jax.report import plots
from mquant_jax.report.findings import by_stack, collect
from mquant_jax.report.page import write_report
from mquant_jax.report.plots import Series
from mquant_jax.report.summary import decibels, sensitive, summary, text
from tests.chat_cases import folder_of
from tests.helpers import GOLDENS, fails, golden

CONFIG_JSON = golden("qwen2_vl", "public")[0]
FAMILY = family_for(CONFIG_JSON)
SAMPLES = 4
# Clip half of the range, so that some values saturate.
HALVED = dataclasses.replace(
    PRESETS["w4a8"],
    name="halved",
    calibration=Calibration(headroom=0.5, max_samples=SAMPLES),
    rules=(("language/layers/*/v_proj", {"w_bits": 8}),),
)
PLAIN = Recipe(name="plain", language=Section(4), weights=Weights(clip=False))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Qwen2-VL with random weights."""
    return folder_of("qwen2_vl/public", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, source, random_float):
    root = tmp_path_factory.mktemp("report")
    (root / "float").symlink_to(random_float)
    for recipe in (PLAIN, HALVED):
        convert(source, root / recipe.name, recipe)
    return root


@pytest.fixture(scope="module")
def halved(folders):
    return collect(folders / "halved")


@pytest.fixture(scope="module")
def prompts(source):
    processor = FAMILY.processor(source, FAMILY.config_from_hf(CONFIG_JSON))
    return load_calibration(None, processor, SAMPLES)


def test_weight_sqnr_is_that_of_source_and_dequantised_weights(folders) -> None:
    path = "language/layers/1/down_proj"
    source, _ = load_params(folders / "float")
    weight = np.asarray(source[f"{path}/kernel"], np.float64)
    with Checkpoint(folders / "plain") as checkpoint:
        rounded = np.asarray(checkpoint.read(f"{path}/kernel").dequantize(), np.float64)
    expected = 10 * np.log10(np.sum(weight**2) / np.sum((weight - rounded) ** 2))
    found = collect(folders / "plain")
    assert decibels(found.weight_errors[path]) == pytest.approx(expected, abs=1e-4)
    assert 10 < expected < 25  # four bits, one scale per channel
    assert not found.output_errors and "rounds to nearest" in " ".join(found.missing)


def test_output_error_is_that_of_the_layers_outputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 24)).astype(np.float32)
    weight = rng.normal(size=(40, 24)).astype(np.float32)
    rounded = np.asarray(quantize_weight(jnp.asarray(weight), 4).dequantize())
    expected = np.linalg.norm(x @ (weight - rounded).T) / np.linalg.norm(x @ weight.T)
    assert relative_output_error(weight, rounded, x.T @ x) == pytest.approx(expected, rel=1e-4)


def test_saturation_is_the_share_of_values_beyond_the_clip(halved, prompts) -> None:
    """The first point's inputs are the patches, which are known without running a model."""
    values = np.abs(np.concatenate([np.ravel(p.patches) for p in prompts]))
    seen = halved.record["points"]["vision/patch_embed/patch_in"]["text"]
    assert seen["amax"] == pytest.approx(values.max(), rel=1e-6)
    assert seen["clip"] == pytest.approx(values.max() / 2, rel=1e-6)
    assert seen["clipped"] == pytest.approx((values > seen["clip"]).mean(), abs=2e-3)
    assert seen["clipped"] > 0.01
    assert seen["rms"] == pytest.approx(np.sqrt(np.mean(values.astype(np.float64) ** 2)), rel=1e-3)
    scale = halved.act_scales["vision/patch_embed/patch_in"]
    assert scale == pytest.approx(seen["clip"] / 127, rel=1e-6)
    before = halved.record["before"]["vision/patch_embed/patch_in"]["text"]
    assert before["rms"] == pytest.approx(seen["rms"], rel=1e-3)
    assert before["amax"] == pytest.approx(seen["amax"], rel=1e-6)
    assert summary(halved)["saturation"]["most_clipped"]["clipped"] >= seen["clipped"]


def test_ranges_before_a_rotation_have_a_class_each(halved) -> None:
    before, after = halved.record["before"], halved.record["points"]
    assert before.keys() == after.keys()
    for point, classes in before.items():
        inner = point.startswith("language/layers/")
        assert set(classes) == ({"text", "visual", "sink"} if inner else {"text"}), point
        assert all(seen["amax"] >= seen["rms"] > 0 for seen in classes.values())


def test_coverage_counts_what_calibration_showed(halved, prompts) -> None:
    seen = halved.record["coverage"]
    lengths = [len(p.input_ids) for p in prompts]
    assert seen["prompts"] == SAMPLES and seen["lengths"][::2] == [min(lengths), max(lengths)]
    assert sum(seen["tokens"].values()) == sum(lengths)
    assert seen["patches"] == sum(len(p.patches) for p in prompts)
    assert seen["tokens"]["visual"] == seen["patches"] // 4  # the merger takes 2 x 2 patches
    assert seen["tokens"]["sink"] == SAMPLES


def test_candidates_come_by_error_and_their_rules_fit(halved) -> None:
    rows = sensitive(halved)
    assert [r.error for r in rows] == sorted((r.error for r in rows), reverse=True)
    assert {r.measure for r in rows} == {"output"}
    kinds = {r.kind for r in rows}
    assert "language/layers/*/v_proj" not in kinds  # a rule gives it 8 bits
    assert "language/head" not in kinds and "language/layers/*/down_proj" in kinds
    row = rows[0]
    kept = dataclasses.replace(HALVED, rules=(*HALVED.rules, row.rule))
    plan = layer_plan(FAMILY, halved.plan.config, kept, stored_bytes(CONFIG_JSON))
    assert plan.bytes_after - halved.plan.bytes_after == row.added_bytes
    assert row.worst[1] == max(e for p, e in halved.output_errors.items() if row.kind == _kind(p))


def _kind(path: str) -> str:
    return re.sub(r"/\d+/", "/*/", path)


def test_the_page_is_one_file(halved, tmp_path) -> None:
    page, *drawn = write_report(halved, tmp_path / "out")
    text = page.read_text()
    assert not re.search(r"https?://|<script|<link|url\(", text)
    sources = re.findall(r'src="([^"]{22})', text)
    assert len(sources) == len(drawn) and set(sources) == {"data:image/png;base64,"}
    assert page.stat().st_size < 400_000
    names = {path.stem for path in drawn}
    assert {"sizes", "weight-sqnr", "output-sqnr", "clipping", "sensitivity"} <= names
    for what in ("ranges", "outliers", "activation-scales", "weight-scales"):
        assert {f"{what}-language-layers", f"{what}-vision-layers"} <= names
    rule = html.escape(json.dumps(["language/layers/*/v_proj", {"w_bits": 8}]))
    words = ("positions [0]", "different pictures", "vision/merger/fc1")
    for word in (f"rule {rule} on section language", *words):
        assert word in text, word
    assert "Missing data" not in text


def test_the_command_prints_the_short_form(folders, tmp_path, capsys) -> None:
    args = ["report", str(folders / "plain"), "-o", str(tmp_path), "--json"]
    assert main(args) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["html"] == str(tmp_path / "report.html") and out["bytes_after"] < out["bytes_before"]
    assert set(out["weight_sqnr_db"]) == {"language"} and out["saturation"] is None
    text = (tmp_path / "report.html").read_text()
    for form in {row["form"] for row in out["forms"]} | {"prefill", "decode", "Kernels"}:
        assert f">{form}<" in text, form
    assert main(["inspect", str(folders / "halved"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["recipe"] == "halved"
    assert main(["inspect", str(folders / "halved")]) == 0
    said = capsys.readouterr().out
    for word in ("weight SQNR (dB): vision", "output SQNR (dB)", "saturation: ", "sinks: ",
                 "first candidates for 8 bits, by output error"):  # fmt: skip
        assert word in said, word


def test_a_float_checkpoint_has_sizes_alone(folders, tmp_path) -> None:
    found = collect(folders / "float")
    _, *drawn = write_report(found, tmp_path)
    assert [path.stem for path in drawn] == ["sizes"] and not found.missing
    assert len({before - after for before, after in found.part_bytes.values()}) == 1


@pytest.mark.slow
def test_a_record_of_before_says_what_it_lacks(halved, tmp_path) -> None:
    """report.json first had only errors and points; a page made from one names what is missing."""
    record = {k: halved.record[k] for k in ("weights", "points", "balance", "sinks")}
    found = dataclasses.replace(halved, record=record)
    page, *drawn = write_report(found, tmp_path)
    names = {path.stem for path in drawn}
    assert {"sizes", "weight-sqnr", "activation-scales-language-layers", "clipping"} <= names
    assert not {"output-sqnr"} & names
    assert "convert the model again" in page.read_text() and "missing: calibration" in text(found)
    assert {row.measure for row in sensitive(found)} == {"weight"}
    assert len(write_report(dataclasses.replace(halved, record={}), tmp_path)) > 4  # scales, sizes


def test_format_2_is_read() -> None:
    found = collect(GOLDENS / "checkpoint_v2")
    path = "language/layers/2/down_proj"
    with Checkpoint(found.folder) as checkpoint:
        scale = checkpoint.read(f"{path}/kernel").scale
    assert found.weight_scales[path][::2] == (scale.min(), scale.max())
    assert found.weight_errors[path] == pytest.approx(0.104232, abs=1e-6)
    assert found.part_bytes["language.layers.*"][1] < found.part_bytes["language.layers.*"][0] / 3


@pytest.mark.parametrize(
    "table, value",
    [
        ("weights", {"language/head/kernel": "much"}),
        ("weights", [1.0]),
        ("points", {"language/head_in": {"text": {"amax": 1.0}}}),
        ("points", {"language/head_in": {"amax": 1.0}}),
        ("before", {"language/head_in": {"text": {"amax": True, "rms": 1.0}}}),
        ("sinks", [0]),
        ("coverage", {"prompts": 1}),
        ("coverage", {"prompts": 1, "patches": 0, "tokens": {"text": 1}, "lengths": [1]}),
        ("split", {"language/layers/0/down_proj": {"channel": 0}}),
    ],
)
def test_a_damaged_record_is_named(folders, tmp_path, table, value) -> None:
    params, manifest = load_params(folders / "float")
    save(tmp_path / "dst", params, family="qwen2_vl", hf_config=CONFIG_JSON, recipe=Recipe(),
         tied_head=manifest["tied_head"], report={table: value})  # fmt: skip
    fails(f"report.json: damaged: {table}: .*convert the model again",
          lambda: collect(tmp_path / "dst"))  # fmt: skip


def test_without_matplotlib(halved, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(r"pip install 'mquant-jax\[report\]'", lambda: write_report(halved, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [1, 28, 80])
def test_pictures_of_any_depth_fit_a_page(depth) -> None:
    rng = np.random.default_rng(0)
    by_name = sorted(range(depth), key=str)  # the order in a manifest
    values = {f"language/layers/{i}/{n}": float(rng.uniform(1, 9)) for i in by_name
              for n in ("attn_in", "attn_out", "mlp_in", "mlp_hidden")}  # fmt: skip
    stacks = by_stack(values)
    for layers in stacks["language/layers"].values():
        assert list(layers) == list(range(depth))
    series = [Series("text", plots.BLUE, "o", stacks["language/layers"])]
    for figure in (plots.lines("t", "u", series), plots.heat("t", "u", stacks, ".1f")):
        width, height = Image.open(io.BytesIO(plots.png(figure))).size
        assert 500 <= width <= 1300 and 150 <= height <= 800


def test_coverage_without_pictures(prompts) -> None:
    """Text-only prompts count no patches."""

    class Text:
        token_class = np.asarray([[0, 0, -1], [0, 0, 0]])
        input_ids = order = np.asarray([[0, 1, 2], [0, 1, 2]])
        vision = None

    seen = coverage([Text()], ([0], []))  # type: ignore[list-item]
    assert seen == {"prompts": 2, "patches": 0, "lengths": [2, 2, 3],
                    "tokens": {"text": 3, "visual": 0, "sink": 2}}  # fmt: skip
