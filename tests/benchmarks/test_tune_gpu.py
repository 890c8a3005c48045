"""Tuning of the GPU kernels: a clear error without a GPU, and a table that the kernels can read."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tune_gpu
from mquant_jax.cli_support import run_cli
from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import gpu, pallas_gpu, xla


def test_without_a_gpu(capsys, monkeypatch) -> None:
    assert run_cli(tune_gpu._run, []) == 2
    assert "timing needs an NVIDIA GPU" in capsys.readouterr().err
    assert run_cli(tune_gpu._run, ["--rows", "0"]) == 2
    assert "--rows must be 1 or more" in capsys.readouterr().err
    assert run_cli(tune_gpu._run, ["--seconds", "nan"]) == 2
    assert "--seconds must be more than 0" in capsys.readouterr().err


def test_shapes() -> None:
    shapes = tune_gpu.shapes_of("qwen2_vl-7b")
    assert (3584, 18944) in shapes and (1280, 5120) in shapes
    assert all(out > 1 for out, _ in shapes)


@pytest.mark.parametrize(("rows", "path"), [(2, gpu.FEW), (33, gpu.MANY)])
def test_timing(monkeypatch, rows, path) -> None:
    """Every candidate is compared with XLA's product before it is timed."""
    small = pallas_gpu.Blocks(64, 16, 32, 4, 2, 1)
    monkeypatch.setattr(tune_gpu, "ordered", lambda *shape: [small])
    times = iter([2.0, 1.0])
    monkeypatch.setattr(tune_gpu, "seconds", lambda *a: next(times))
    found = list(tune_gpu.timed(rows, 70, 96, interpret=True))
    assert [entry["path"] for entry in found] == [gpu.XLA, path]
    assert pallas_gpu.Blocks(*found[1]["blocks"]) == small
    monkeypatch.setattr(
        tune_gpu, "_form", lambda many, blocks, interpret: lambda x, w: np.zeros((rows, 70))
    )
    times = iter([2.0, 1.0])
    with pytest.raises(tune_gpu.UserError, match="computes something else"):
        list(tune_gpu.timed(rows, 70, 96, interpret=True))


def test_the_cut_in_use_comes_first() -> None:
    for rows in (1, 1024):
        found = tune_gpu.ordered(rows, 3584, 3584)
        assert dataclasses.astuple(found[0]) == gpu.choose(rows, 3584, 3584).blocks
        assert len(found) == len(set(found)) > 1


def test_products_take_turns(monkeypatch, tmp_path) -> None:
    """Candidates are timed round-robin: every product has an entry when time runs out, and the file
    always holds the fastest so far."""
    turns: list[tuple[int, float]] = []

    def timed(rows, out, k, interpret):
        for us in (3.0, 1.0, 2.0):
            turns.append((rows, us))
            yield {"path": gpu.XLA, "us": us * rows}

    monkeypatch.setattr(tune_gpu, "timed", timed)
    products, saved = [(1, 8, 8), (2, 8, 8)], tmp_path / "table.json"
    whole = tune_gpu.time_all(products, math.inf, saved)
    assert [us for _, us in turns] == [3.0, 3.0, 1.0, 1.0, 2.0, 2.0]
    assert [e["us"] for e in whole["shapes"]] == [1.0, 2.0] and "Every" in whole["origin"]
    assert json.loads(saved.read_text()) == whole
    clock = iter([0.0, 1.0, 2.0, 3.0, 9.0])
    monkeypatch.setattr(tune_gpu.time, "perf_counter", lambda: next(clock))
    part = tune_gpu.time_all(products, 5.0, saved)
    assert [e["us"] for e in part["shapes"]] == [1.0, 6.0] and "Time was up" in part["origin"]


def test_timing_runs_every_layer(monkeypatch) -> None:
    """The timed program multiplies by every layer of a stack; none is eliminated as dead code."""
    for name, value in (("STACK_BYTES", 1), ("_PASSES", 1), ("_RUNS", 2)):
        monkeypatch.setattr(tune_gpu, name, value)
    assert tune_gpu.layers_of(8, 6) == 8 and tune_gpu.layers_of(18944, 3584) == 8
    seen = []

    def call(x, w):
        jax.debug.callback(lambda i: seen.append(int(i)), w.layer)
        return xla.packed_int_dot(x, w.of_layer())

    x = QTensor(jnp.ones((2, 6), jnp.int8), jnp.float32(1))
    stack = QWeight(jnp.ones((8, 8, 3), jnp.uint8), jnp.ones((8, 8, 1)), 6, 4, "packed")
    assert tune_gpu.seconds(call, x, stack) > 0
    jax.effects_barrier()
    assert sorted(seen) == sorted(3 * list(range(8)))  # one warm-up run, two timed ones


def test_the_table(monkeypatch, tmp_path, capsys) -> None:
    """The kernels can read a written table; the compiler is mocked."""
    monkeypatch.setattr(tune_gpu, "prepare", lambda device: None)
    monkeypatch.setattr(tune_gpu, "sharding", lambda device: None)
    entry = {"blocks": [64, 16, 64, 4, 4, 2], "score_us": 1.5}
    monkeypatch.setattr(tune_gpu, "analyse", lambda *shape: [entry])
    saved = tmp_path / "table.json"
    assert run_cli(tune_gpu._run, ["--ahead-of-time", "--rows", "3", "--save", str(saved)]) == 0
    assert "pallas_gpu_gemv" in capsys.readouterr().out
    table = json.loads(saved.read_text())
    assert "No device" in table["origin"] and table["classes"] == gpu.table()["classes"]
    monkeypatch.setattr(gpu, "table", lambda: table)
    gpu.choose.cache_clear()
    assert gpu.choose(4, 3584, 3584).blocks == (64, 16, 64, 4, 4, 2)
    gpu.choose.cache_clear()
