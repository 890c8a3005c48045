"""Conversions that choose bits within a budget first."""

import dataclasses
import json

import pytest

from mquant_jax.cli import main
from mquant_jax.errors import UserError
from mquant_jax.presets import PRESETS
from mquant_jax.ptq import convert as conversion
from mquant_jax.ptq.budget import choose_for
from mquant_jax.ptq.convert import convert
from mquant_jax.recipe import Recipe
from tests.chat_cases import folder_of
from tests.helpers import fails

RECIPE = dataclasses.replace(
    PRESETS["w4a8"],
    balance=False,
    calibration=dataclasses.replace(PRESETS["w4a8"].calibration, max_samples=2),
)
BUDGET = 7.0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Qwen2-VL with random weights."""
    return folder_of("qwen2_vl/public", tmp_path_factory.mktemp("source"))


def test_the_choice_is_that_of_allocate_and_is_made_once(source, tmp_path, monkeypatch) -> None:
    dst, counted = tmp_path / "dst", []
    choose = conversion.choose

    def counting(*args):
        counted.append(args)
        return choose(*args)

    monkeypatch.setattr(conversion, "choose", counting)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_header", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, dst, RECIPE, budget=BUDGET)
    kept = json.loads((tmp_path / "dst.work" / "recipe.json").read_text())
    fails("chosen for another recipe or budget",
          lambda: convert(source, dst, RECIPE, budget=BUDGET + 0.5, resume=True))  # fmt: skip
    manifest = convert(source, dst, RECIPE, budget=BUDGET, resume=True)
    assert len(counted) == 1
    expected = choose_for(source, RECIPE, BUDGET).recipe
    assert expected.rules and expected.name == "w4a8-auto"
    assert Recipe.from_json(kept["recipe"]) == expected == Recipe.from_json(manifest["recipe"])
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


def test_options_that_do_not_go_together(source, tmp_path, capsys) -> None:
    dst = str(tmp_path / "dst")
    for options, message in (
        (["--recipe", "auto"], "--recipe auto: chooses bits within a budget; add --budget"),
        (["--recipe", "auto", "--budget", "1"], "bits per weight at least"),
        (["--recipe", "w8a8", "--budget", "9"], "leaves nothing to choose"),
        (["--recipe", "auto", "--budget", "7", "--dry-run"], "which --dry-run does not read"),
    ):
        assert main(["convert", str(source), dst, *options]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_measuring_needs_data_where_converting_does_not(source, tmp_path) -> None:
    recipe = dataclasses.replace(PRESETS["w4a8-rtn"], calibration=RECIPE.calibration)
    dynamic = dataclasses.replace(
        recipe, **{p: dataclasses.replace(recipe.section(p), activations="dynamic")
                   for p in ("vision", "connector", "language", "head")}
    )  # fmt: skip
    assert not dynamic.needs_calibration
    manifest = convert(source, tmp_path / "dst", dynamic, budget=BUDGET)
    assert manifest["recipe"]["rules"]
    with pytest.raises(UserError, match="exists"):
        convert(source, tmp_path / "dst", dynamic, budget=BUDGET)
