"""The table of the llava benchmark: the recipe of each row, and resuming a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import llava_rows as llava
from benchmarks.accuracy import ablation_rows, run_llava, table
from mquant_jax.errors import UserError
from mquant_jax.nn.params import get_params
from mquant_jax.presets import METHODS
from mquant_jax.recipe import Section
from tests.helpers import forward, golden_model, relative
from tests.llava_cases import CLIP


def test_rows_vary_one_axis_at_a_time() -> None:
    rows = llava.rows()
    assert len(rows) <= 24 and len({tuple(r.key().values()) for r in rows}) == len(rows)
    assert {r.method for r in rows} == set(METHODS)
    center = rows[0]
    for row in rows:
        changed = [k for k, v in row.key().items() if v != center.key()[k]]
        assert set(changed) <= {"method", "activations", "scope", "group_size", "weights"}
        assert row.method != "mquant" or len(changed) <= 2
    for axis, values in (
        ("activations", {"shared", "modality", "modality+sink", "dynamic"}),
        ("scope", {"all", "tower", "language"}),
        ("weights", set(llava.WEIGHTS)),
        ("group_size", {None, 64}),
    ):
        of_mquant = [r for r in rows if r.method == "mquant"]
        assert {getattr(r, axis) for r in of_mquant} == values


def test_a_row_changes_scales_and_sections_alone() -> None:
    whole = llava.Row("mquant").plan()
    assert whole.modality_scales and whole.sink_class and whole.tune == METHODS["mquant"].tune
    assert [str(whole.section(s)) for s in ("head", "embedding")] == [str(Section())] * 2
    assert len(llava.Row("mquant", "modality").plan().class_groups) == 2
    shared = llava.Row("mquant", "shared").plan()
    assert len(shared.class_groups) == 1 and shared.rotate
    tower = llava.Row("rtn", "shared", scope="tower").plan()
    assert tower.vision == Section(4, None, "static") == tower.connector
    assert not tower.language.quantised
    language = llava.Row("rtn", "shared", scope="language", group_size=64).plan()
    assert not language.vision.quantised and language.language == Section(4, 64, "static")
    assert llava.Row("mquant", weights="w4a8-v8").plan().vision.w_bits == 8
    floats = llava.Row("mquant", weights="w4a16")
    assert floats.plan().language == Section(4, None, "none")
    assert floats.name == "mquant, float activations"


def test_dynamic_rows_take_over_the_static_weights() -> None:
    dynamic = llava.Row("quarot", "dynamic", group_size=64)
    assert dynamic.rounded_as() == llava.Row("quarot", "modality+sink", group_size=64)
    static, plan = dynamic.rounded_as().plan(), dynamic.plan()
    assert plan.language == dataclasses.replace(static.language, activations="dynamic")
    assert (plan.weights, plan.class_groups) == (static.weights, static.class_groups)


MEASURED = {
    "exact_match": 0.5, "delta": -0.01, "delta_ci95": [-0.02, 0.0], "kl": 0.1,
    "token_agreement": 0.9, "by_task": {}, "quantise_seconds": 3.0,
}  # fmt: skip


def row_of(row: llava.Row) -> dict:
    return row.key() | MEASURED


def test_a_run_goes_on_where_it_stopped(tmp_path) -> None:
    rows, file = llava.rows()[:3], tmp_path / "result.json"
    head = {"bed": "llava", "n": 7, "fingerprint": ["a"]}
    assert llava.kept(file, head) == []
    file.write_text(
        json.dumps(head | {"float_exact_match": 0.6, "rows": [row_of(rows[1])], "gains": []})
    )
    kept = llava.kept(file, head)
    assert llava.missing(rows, kept) == [rows[0], rows[2]]
    shown = table(json.loads(file.read_text()))
    assert "60.0% of 7" in shown and "-1.0" in shown and "90.0%" in shown
    with pytest.raises(UserError, match="fingerprint"):
        llava.kept(file, head | {"fingerprint": ["b"]})


def test_steps_of_an_ablation_keep_their_recipe() -> None:
    for step in ablation_rows():
        plan = llava.Row(step.method, recipe=step.recipe).plan()
        assert (plan.rotate, plan.weights, plan.tune, plan.class_groups) == (
            step.recipe.rotate, step.recipe.weights, step.recipe.tune, step.recipe.class_groups
        )  # fmt: skip


def test_an_ablation_compares_each_part_with_all_before_it() -> None:
    rows = [llava.Row(r.method, recipe=r.recipe) for r in ablation_rows()]
    compared = [(new.method, old.method) for new, old in llava.steps(rows)]
    assert compared[:3] == [("+rotation", "rtn"), ("+gptq", "+rotation"), ("+msq", "+gptq")]
    assert compared[-4:] == [
        ("mquant", "+balance"), ("mquant", "mquant, no learning"),
        ("mquant, by block", "mquant, no learning"), ("plain Hadamard +rms", "plain Hadamard"),
    ]  # fmt: skip
    assert llava.steps(rows[:1]) == []


class TinyBed:
    """Uses a golden's model in place of the assembled one."""

    n, fingerprint, questions = 8, ["tiny"], [4, 4]
    float_result = {"float_exact_match": 1.0, "float_by_task": {"t": 1.0}}

    def __init__(self, questions: int | None, folder: Path | None):
        self.family, model, self.config, inputs, _ = golden_model(CLIP)
        self.params = get_params(model)
        self.calibration = self.family.reference_batch(self.config, inputs)
        self._logits = np.asarray(forward(model, self.calibration))

    def evaluate(self, module) -> dict:
        apart = relative(forward(module, self.calibration), self._logits)
        return MEASURED | {"kl": apart, "right": "ff"}


@pytest.mark.slow
def test_a_run_measures_rows_and_continues(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("benchmarks.llava_bed.LlavaBed", TinyBed)
    rows = [llava.Row("rtn", "modality+sink"), llava.Row("rtn", "dynamic")]
    file = tmp_path / "result.json"
    args = SimpleNamespace(folder=None, seed=0, save=file, resume=True, ablation=False)
    first = run_llava(rows[:1], None, args)
    both = run_llava(rows, None, args)
    assert both["rows"][0] == first["rows"][0] and len(both["rows"]) == 2
    assert json.loads(args.save.read_text()) == both
    assert all(0 < r["kl"] < 1 for r in both["rows"])
    assert [g["row"] for g in both["gains"]] == ["rtn, dynamic"]
    assert run_llava(rows, None, args) == both  # all rows are measured
    assert "rtn" in table(both)
    chosen = llava.Row("rtn, 7 bits", recipe=METHODS["rtn"], budget=7.0)
    assert llava.budget_pairs([chosen]) == [(chosen, llava.Row("mquant", group_size=64))]
    best = run_llava([*rows, chosen], None, args)["rows"][-1]
    assert best["method"] == "rtn, 7 bits" and best["kl"] < both["rows"][0]["kl"]


def test_gains_are_paired_differences_of_rows() -> None:
    """Four pictures with two questions each; per-modality scales correct one answer."""
    right = {"shared": [1, 0, 1, 0, 1, 0, 1, 0], "modality": [1, 1, 1, 0, 1, 0, 1, 0]}
    rows = [
        row_of(llava.Row("mquant", activations))
        | {"right": np.packbits(hits).tobytes().hex(), "kl": 0.1 * len(activations)}
        for activations, hits in right.items()
    ]
    (gain,) = llava.gains({"rows": rows, "questions": [2] * 4}, llava.pairs())
    assert (gain["row"], gain["over"]) == ("mquant, modality", "mquant, shared")
    assert gain["delta"] == 1 / 8 and gain["kl_over"] == pytest.approx(0.6)
    low, high = gain["delta_ci95"]
    assert low == 0 and 1 / 8 < high <= 1 / 2


def test_intervals_draw_pictures_whole() -> None:
    """Questions about one picture whose answers change together count as one observation."""
    one, many = np.asarray([1.0, 0, 0, 0, 0, 0]), np.arange(6)
    got = llava.interval(np.repeat(one, 10), np.repeat(many, 10))
    assert got == llava.interval(one, many) and got[1] >= 0.5
