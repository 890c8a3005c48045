"""Two checkouts in turns: intervals of ratios, and what is refused."""

import sys

import pytest

from benchmarks import paired
from mquant_jax.errors import UserError


def rounds(seconds: list[float]) -> list[dict[str, list[float]]]:
    return [{"w4a8": [s, s, s]} for s in seconds]


def test_a_loss_is_excluded_only_where_the_interval_ends_below_it() -> None:
    noise = [1.0, 1.3, 0.9, 1.1, 2.0] * 3
    for factor, excluded in ((0.8, True), (1.0, True), (1.04, True), (1.2, False)):
        rows = paired.compared(rounds([factor * s for s in noise]), rounds(noise))
        assert [r["part"] for r in rows] == list(paired.PARTS)
        for row in rows:
            assert row["ratio"] == pytest.approx(factor)
            assert row["excludes_loss"] is excluded
    uneven = paired.compared(rounds([1.0, 1.2] * 8), rounds([1.0] * 16))[0]
    assert uneven["ratio_ci95"][0] < uneven["ratio"] < uneven["ratio_ci95"][1]
    assert not uneven["excludes_loss"]


def test_what_is_no_checkout_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no checkout of this package \(benchmarks/speed.py"):
        paired.Worker(tmp_path, tmp_path, [])
    with pytest.raises(UserError, match="no such interpreter; install .* --python"):
        paired.Worker(paired.HERE, tmp_path / "python", [])


def test_a_process_that_ends_is_reported(capfd) -> None:
    worker = paired.Worker(paired.HERE, paired.Path(sys.executable), ["no-suite", "1", "1", "w4a8"])
    try:
        with pytest.raises(UserError, match="its process ended"):
            worker.answer()
    finally:
        worker.close()
    assert "KeyError: 'no-suite'" in capfd.readouterr().err


@pytest.mark.slow
def test_a_checkout_is_compared_with_itself() -> None:
    tree = paired.HERE, paired.Path(sys.executable)
    found = paired.measure([tree, tree], ["cpu-2b", "1", "2", "w4a8,w4a8-aifs"], 2)
    rows = paired.compared(*found)
    assert len(rows) == 6 and all(r["seconds"] > 0 for r in rows)
    assert "w4a8-aifs" in paired.table({"rows": rows})
