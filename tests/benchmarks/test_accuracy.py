"""The plan of the accuracy benchmark: the recipe of each row."""

from benchmarks.accuracy import GROUP, Row, _run, ablation_rows, method_rows, table
from mquant_jax.presets import METHODS
from mquant_jax.recipe import SECTIONS, Recipe
from tests.helpers import fails


def test_every_method_is_measured_static_and_dynamic_in_each_group_size() -> None:
    rows = method_rows((None, GROUP))
    assert {(r.method, r.group_size, r.activations) for r in rows} == {
        (m, g, a) for m in METHODS for g in (None, GROUP) for a in ("static", "dynamic")
    }


def test_a_row_changes_groups_activations_and_head_and_nothing_else() -> None:
    row = Row("mquant", METHODS["mquant"], GROUP, "dynamic")
    plan = row.plan(float_head=True)
    assert plan.language.group_size == GROUP and plan.vision.group_size is None
    assert {plan.section(s).activations for s in SECTIONS[:3]} == {"dynamic"}
    assert not plan.head.quantised and plan.head.activations == "none"
    assert plan.weights == METHODS["mquant"].weights and plan.rotate


def test_the_ablation_leads_from_rounding_to_the_whole_method() -> None:
    rows = {row.method: row.recipe for row in ablation_rows()}
    assert rows["rtn"] == METHODS["rtn"]
    quarot, last = rows["+gptq"], rows["+learned scales"]
    assert quarot.rotate and quarot.n_classes == 1 and not quarot.split.wanted
    full = METHODS["mquant"]
    assert rows["mquant"] == full
    for part in ("weights", "calibration", "tune"):
        assert getattr(last, part) == getattr(full, part)
    assert last.modality_scales and last.sink_class and last.split.wanted
    assert not rows["plain Hadamard +rms"].online_signs
    assert len({Recipe.from_json(r.to_json() | {"name": "x"}) for r in rows.values()}) >= 8


def test_a_method_without_a_row_is_named() -> None:
    fails("--method nothing: no row is named so; known: rtn, smoothquant",
          lambda: _run(["--method", "nothing", "--quick"]))  # fmt: skip


def test_tables_show_both_kinds_of_bed() -> None:
    head = {"method": "rtn", "group_size": None, "activations": "static", "kl": 0.5,
            "quantise_seconds": 3.0}  # fmt: skip
    match = head | {"exact_match": 0.875, "ci95": [0.8, 0.9]}
    shown = table({"float_exact_match": 0.9, "float_ci95": [0.88, 0.92], "n": 40, "rows": [match]})
    assert "87.5%" in shown and "of 40" in shown
    text = table({"float_ppl": 20.0, "rows": [head | {"ppl": 25.0, "ratio": 1.25}]})
    assert "25.000" in text and "1.2500" in text
