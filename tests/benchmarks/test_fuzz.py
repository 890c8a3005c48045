"""The fuzzing command: a short run, and how it classifies each kind of failure."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.bed import Bed
from benchmarks.fuzz.kinds import KINDS
from benchmarks.fuzz.pool import Limits, Pool, judge
from mquant_jax.errors import UserError


def misbehave(case: int, seed: int, bed: Bed, notes: list[str]) -> None:
    """Cases with known outcomes, run in a worker process of the pool."""
    bed.put(bed.root / "file", b"damaged")
    notes.append(f"seed {seed}")
    if case == 1:
        raise UserError("refused")
    if case == 2:
        raise KeyError("x")
    if case == 3:
        while True:
            pass
    if case == 4:
        np.ones(1 << 28, np.uint8)
    if case == 5:
        os._exit(3)
    if case == 6:
        assert (bed.root / "scratch").is_dir()


@pytest.mark.slow
def test_every_outcome_is_told_apart(tmp_path) -> None:
    (tmp_path / "bed" / "scratch").mkdir(parents=True)
    (tmp_path / "bed" / "file").write_bytes(b"whole")
    with Pool(tmp_path / "bed", 7, Limits(1.0, 1 << 27), misbehave) as pool:
        found = [pool.run(case) for case in range(7)]
    outcomes = [one["outcome"] for one in found]
    expected = ["accepted", "refused", "unclear", "hang", "memory", "unclear", "accepted"]
    assert outcomes == expected
    assert found[1]["notes"] == ["seed 7"] and "misbehave" in found[2]["where"]
    assert "died: 3" in found[5]["error"]
    assert (tmp_path / "bed" / "file").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "error", [OSError("x"), MemoryError(), SystemExit(2), UserError("x" * 3000)]
)
def test_what_is_no_clear_refusal(error) -> None:
    def run() -> None:
        raise error

    assert judge(run)["outcome"] == ("memory" if isinstance(error, MemoryError) else "unclear")


def test_damage_is_undone(tmp_path) -> None:
    bed = Bed(tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "a").write_bytes(b"whole")
    bed.put(tmp_path / "a", b"x")
    bed.put_special(random.Random(0), tmp_path / "a")
    bed.scratch("made").mkdir()
    bed.restore()
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "scratch"]


@pytest.mark.slow
def test_rehearsal(capsys) -> None:
    assert fuzz._run(["--cases", "200", "--seed", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["total"].values()) == result["cases"] == 200
    assert list(result["kinds"]) == list(KINDS) and result["faults"] == []
    assert result["total"]["accepted"] > 10 and result["total"]["refused"] > 100


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="--kinds nothing: known are header"):
        fuzz._run(["--kinds", "nothing"])
