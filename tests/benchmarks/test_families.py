"""The comparison of families: every multimodal family has a wide variant that can be quantised."""

import json

import numpy as np
import pytest

from benchmarks.families import GOLDENS, WIDE, error, merged, table
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.presets import METHODS
from mquant_jax.ptq.pipeline import untied


def test_every_family_with_pictures_is_compared() -> None:
    families = {
        family_for(json.loads(path.read_text()), path) for path in GOLDENS.glob("*/*/config.json")
    }
    compared = {family_for(json.loads((GOLDENS / c / "config.json").read_text())) for c in WIDE}
    assert compared == {f for f in families if f.pictures}


@pytest.mark.parametrize("case", WIDE)
def test_wide_forms_are_wide_and_fit_every_method(case) -> None:
    hf = merged(json.loads((GOLDENS / case / "config.json").read_text()), WIDE[case])
    family = family_for(hf)
    config = family.config_from_hf(hf)
    assert config.language.hidden_size == 512
    config, _ = untied(config, {"language/embedding": np.zeros(1)})
    for recipe in METHODS.values():
        names = abstract_params(abstract_model(family, config, recipe))
        assert any("vision/layers/0/" in name for name in names)


def test_dictionaries_are_merged_and_values_replaced() -> None:
    config = {"a": 1, "b": {"c": 2, "d": None}, "e": [1, 2]}
    assert merged(config, {"b": {"d": 3}, "e": [5], "f": {"g": 1}}) == {
        "a": 1, "b": {"c": 2, "d": 3}, "e": [5], "f": {"g": 1},
    }  # fmt: skip


def test_the_table_shows_what_differs() -> None:
    row = {"case": "x/y", "pictures": "1", "videos": "no", "rows_in_case": 3, "float": 1e-6,
           "greedy_equal": False, "rotated": 2e-6, "rtn": 0.7, "quarot": 0.4,
           "mquant": 0.3}  # fmt: skip
    shown = table([row])
    assert "| x/y | 1 | no | ragged, 3 tried | 1.0e-06 | **differs** | 2.0e-06 | 0.700 |" in shown
    assert shown.endswith("| **float** |")
    assert error(np.ones(4), np.ones(4)) == 0
