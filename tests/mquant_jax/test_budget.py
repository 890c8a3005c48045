"""Mixed precision within a budget: costs, allocation, and the resulting recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from mquant_jax.cli import main
from mquant_jax.nn.params import get_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.budget import allocate, choose
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.ptq.sensitivity import Cost, stored_bits
from mquant_jax.recipe import Recipe
from mquant_jax.samples import DEMO_ASSETS
from mquant_jax.sections import Section
from tests.helpers import fails, golden_model

W4A8 = dataclasses.replace(PRESETS["w4a8"], balance=False)


def costs(*pairs: tuple[float, float]) -> list[Cost]:
    return [Cost(Section(4), bits, error) for bits, error in pairs]


def total(chosen: dict[str, Cost], sizes) -> tuple[float, float]:
    weights = {name: out * k for name, (out, k) in sizes.items()}
    bits = sum(c.bits * weights[n] for n, c in chosen.items()) / sum(weights.values())
    return bits, sum(c.error for c in chosen.values())


def test_the_choice_is_as_good_as_any_of_its_size() -> None:
    """No combination of at most the same size has a smaller error."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        some = {
            f"l{i}": costs(*zip((4.0, 4.5, 8.0), np.sort(rng.uniform(0.01, 1, 3))[::-1],
                                strict=True))
            for i in range(5)
        }  # fmt: skip
        sizes = {name: (4, int(rng.integers(1, 4))) for name in some}
        budget = float(rng.uniform(4.2, 7.5))
        chosen = allocate(some, sizes, budget)
        bits, error = total(chosen, sizes)
        assert bits <= budget + 1e-9
        every = (dict(zip(some, combo, strict=True)) for combo in itertools.product(*some.values()))
        best = min(e for b, e in (total(c, sizes) for c in every) if b <= bits + 1e-9)
        assert error <= best + 1e-9  # points on the convex hull are optimal for their size


def test_the_choice_on_hand_worked_costs() -> None:
    some = {"a": costs((4, 0.5), (4.5, 0.4), (8, 0.01)), "b": costs((4, 0.2), (8, 0.15))}
    sizes = {"a": (1, 10), "b": (1, 10)}
    assert [c.bits for c in allocate(some, sizes, 4.0).values()] == [4, 4]
    assert [c.bits for c in allocate(some, sizes, 4.25).values()] == [4.5, 4]
    assert [c.bits for c in allocate(some, sizes, 6.0).values()] == [8, 4]
    assert [c.bits for c in allocate(some, sizes, 8.0).values()] == [8, 8]
    # A fixed layer with 8 bits uses part of the budget.
    assert [c.bits for c in allocate(some, sizes, 4.25, (20, 160.0)).values()] == [4, 4]
    worse = {"a": costs((4, 0.5), (4.5, 0.6), (8, 0.4))}  # groups may not help
    assert allocate(worse, {"a": (1, 1)}, 5)["a"].bits == 4
    assert stored_bits(Section(4, 64), 256) == 4.5 and stored_bits(Section(8), 128) == 8.25


@pytest.fixture(scope="module")
def llama():
    family, model, config, inputs, _ = golden_model("llama/public")
    return family, config, get_params(model), family.reference_batch(config, inputs)


def test_a_model(llama) -> None:
    family, config, params, batch = llama
    budget = 6.2
    chosen = choose(family, config, W4A8, budget, params, batch)
    assert 5.9 < chosen.bits <= budget and chosen.after < 0.8 * chosen.before
    assert chosen.recipe.name == "w4a8-auto" and chosen.recipe.rules
    assert Recipe.from_json(json.loads(json.dumps(chosen.recipe.to_json()))) == chosen.recipe
    for path, section in chosen.sections.items():
        assert chosen.recipe.section_for(path) == section
    config, params = untied(config, params)
    made, _ = quantize_params(family, config, chosen.recipe, params, batch)
    stored = {n.removesuffix("/kernel"): v for n, v in made.items() if n.endswith("/kernel")}
    sizes = {n: v.out_features * v.in_features for n, v in stored.items()}
    bits = sum(sizes[n] * (v.bits + 32 * v.groups / v.in_features) for n, v in stored.items())
    assert bits / sum(sizes.values()) == pytest.approx(chosen.bits)


def test_rules_of_the_base_stay(llama) -> None:
    family, config, params, batch = llama
    base = dataclasses.replace(W4A8, rules=(("language/layers/1/*", {"w_bits": 8}),))
    chosen = choose(family, config, base, 7.9, params, batch)
    assert chosen.recipe.rules[: len(base.rules)] == base.rules
    assert not [path for path in chosen.sections if path.startswith("language/layers/1/")]


def test_budgets_that_cannot_be_kept(llama) -> None:
    family, config, params, batch = llama
    for budget in (4.0, 0.0):
        fails(r"--budget \S+: recipe 'w4a8' takes \d\.\d+ bits per weight at least",
              lambda b=budget: choose(family, config, W4A8, b, params, batch))  # fmt: skip
    fails("expected a finite number",
          lambda: choose(family, config, W4A8, float("nan"), params, batch))  # fmt: skip
    fails("leaves nothing to choose",
          lambda: choose(family, config, PRESETS["w8a8"], 8.5, params, batch))  # fmt: skip


@pytest.mark.slow
def test_the_command(tmp_path, capsys) -> None:
    source, out = str(DEMO_ASSETS / "model"), str(tmp_path / "mixed.json")
    base = tmp_path / "base.json"
    few = dataclasses.replace(W4A8.calibration, max_samples=4)
    base.write_text(json.dumps(dataclasses.replace(W4A8, calibration=few).to_json()))
    arguments = ["allocate", source, "-o", out, "--recipe", str(base), "--budget"]
    assert main([*arguments, "5.5"]) == 0
    text = capsys.readouterr().out
    assert "language/layers/*/down_proj" in text and "bits per weight; sum of" in text
    rules = Recipe.from_json(json.loads((tmp_path / "mixed.json").read_text())).rules
    assert rules and all(not rule.pattern.count("*") for rule in rules)
    assert main([*arguments, "5.5"]) == 2
    assert "exists already" in capsys.readouterr().err
