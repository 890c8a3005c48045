"""The memory plan for accelerators against XLA's memory analysis of compiled programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.aot.devices import DEVICES
from benchmarks.aot.sizes import MODELS
from mquant_jax.commands import inspect
from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.presets import PRESETS
from mquant_jax.recipe import Section
from mquant_jax.runtime.memory import ACCELERATORS, memory_plan
from tests.helpers import GOLDENS, fails

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CASES = [("v5e", "tpu-v5e", "2b"), ("v5e", "tpu-v5e", "7b"), ("v6e", "tpu-v6e", "7b"),
         ("v5p", "tpu-v5p", "7b"), ("h100-80", "h100", "7b")]  # fmt: skip


@pytest.mark.parametrize(("device", "target", "size"), CASES)
def test_the_plan_is_what_the_compiler_says(device, target, size):
    model = f"qwen2_vl-{size}"
    result = json.loads((RESULTS / f"aot-{target}-{model}.json").read_text())
    memory = result["variants"]["w4a8-static"]["decode"]["memory"]
    config = FAMILY.config_from_hf(MODELS[model])
    # Rotated checkpoints have untied heads.
    language = dataclasses.replace(config.language, tied_head=False)
    config = dataclasses.replace(config, language=language)
    recipe = dataclasses.replace(PRESETS["w4a8"], embedding=Section())  # as in the compiled program
    plan = memory_plan(FAMILY, config, recipe, device, context=result["cache_slots"])
    # Both include weights, cache and the inputs of one step, in their device layouts.
    assert plan.weights + plan.cache == pytest.approx(memory["arguments"], rel=0.01)
    assert plan.capacity < DEVICES[target].memory == ACCELERATORS[device].memory


def test_contexts():
    config = FAMILY.config_from_hf(MODELS["qwen2_vl-7b"])

    def plan(**options):
        return memory_plan(FAMILY, config, PRESETS["w4a8"], "v5e", **options)

    limit = config.language.max_positions
    one = plan(context=2048)
    assert one.fits and plan(context=2048, batch=2).cache == pytest.approx(2 * one.cache, rel=1e-3)
    assert plan(int8_cache=True).cache < 0.6 * plan().cache
    many = plan(context=2048, batch=24)
    assert 0 < many.longest_context < limit
    assert plan(context=many.longest_context, batch=24).fits
    assert not plan(context=many.longest_context + 1, batch=24).fits
    fails("--context 0: expected 1 to", lambda: plan(context=0))
    fails(f"expected 1 to {limit}, the model", lambda: plan(context=limit + 1))


def test_the_vision_tower_counts():
    config = FAMILY.config_from_hf(MODELS["qwen2_vl-2b"])

    def plan(context=256, **options):
        return memory_plan(FAMILY, config, PRESETS["w4a8"], "v5e", context=context, **options)

    few, many = plan(), plan(patches=65536)
    assert few.patches == 8192 == plan(patches=5).patches
    # Per patch: five times the width in bf16, and three times the MLP's width in 32 bits.
    assert many.working == 65536 * (5 * 2 * 1280 + 3 * 4 * 5120) == 8 * few.working
    assert plan(patches=180_000).longest_context < few.longest_context
    assert plan(context=32768).working > few.working  # the prefill dominates


def test_the_command(capsys):
    checkpoint = str(GOLDENS / "checkpoint_v2")
    assert inspect.main([checkpoint, "--memory", "--device", "v5e", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["memory"]
    assert plan["fits"] and plan["device"] == "v5e"
    assert plan["total"] == plan["weights"] + plan["cache"] + plan["working"]
    assert inspect.main([checkpoint, "--memory", "--batch", "3", "--context", "64"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [*ACCELERATORS]
    for options in (
        ["--memory", "--batch", "0"],
        ["--context", "5"],
        ["--patches", "5"],
        ["--memory", "--device", "x"],
    ):
        with pytest.raises(UserError):
            inspect.main([checkpoint, *options])
