"""The kill experiment (conversions that are killed and resumed) on a small model."""

from __future__ import annotations

import pytest

from benchmarks import kills
from mquant_jax.errors import UserError
from tests.helpers import GOLDENS


@pytest.mark.slow
def test_killed_and_resumed_conversions_give_the_same(tmp_path):
    source = GOLDENS / "llama" / "public"
    result = kills.run(tmp_path, (source, None), "float", 4, 0)
    assert result["kills"] == 4 and result["chains"] >= 1
    assert result["differences"] == result["leftovers"] == 0


def test_errors_of_the_conversion_are_shown(tmp_path):
    with pytest.raises(UserError, match="ended with 2: error: .*no such folder"):
        kills.convert((tmp_path / "nowhere", None), tmp_path / "dst", "float")
