"""Whole models with accelerator kernels lower on a machine without an accelerator. Interpret mode
does not cover lowering; without these tests, users would be the first to see its errors."""

from __future__ import annotations

import jax
import pytest

from benchmarks.aot.devices import DEVICES
from benchmarks.aot.programs import PROGRAMS, Setup, build, prompt
from benchmarks.aot.sizes import MODELS
from mquant_jax.models.registry import family_for
from mquant_jax.ops.registry import recording
from mquant_jax.presets import PRESETS
from mquant_jax.target import tracing_for
from tests.helpers import mostly_slow

LOWERS_FOR = {"gpu": "cuda", "tpu": "tpu"}
CALLS = {"gpu": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
# Qwen2-VL-7B, and Qwen2.5-VL for its windows: pictures larger than a window, prompts of many
# blocks.
QWEN2_5 = MODELS["qwen2_vl-7b"] | {
    "model_type": "qwen2_5_vl",
    "vision_config": {"model_type": "qwen2_5_vl", "hidden_size": 1280, "out_hidden_size": 3584},
}
CASES = [f"{device} {recipe} {program}" for device in ("h100", "tpu-v5e")
         for recipe in ("w4a8", "w4a8-dynamic", "float") for program in PROGRAMS]  # fmt: skip
CASES.remove("tpu-v5e float decode")  # runs none of our kernels
FAST = [case for case in CASES if " w4a8 " in case] + ["h100 float prefill", "h100 float decode"]


def lowered(hf: dict, device: str, recipe: str, program: str) -> set[tuple[str, str]]:
    """Lower a program that contains kernels; return ``(operation, implementation)`` pairs."""
    family = family_for(hf, "config.json")
    config = family.config_from_hf(hf)
    chip = DEVICES[device]
    if chip.platform == "gpu" and jax.__version_info__ >= (0, 11):
        pytest.skip("kernels lower only where there is a GPU, from jax 0.11 on")
    setup = Setup(family, config, prompt(family, config, 1024, 448), 2048)
    with tracing_for(chip.platform, chip.name), recording() as ran:
        step, args, _ = build(setup, PRESETS[recipe], program, None)
        traced = jax.jit(step).trace(*args)
        text = traced.lower(lowering_platforms=(LOWERS_FOR[chip.platform],)).as_text()
    assert CALLS[chip.platform] in text
    return {(choice.op, choice.name) for choice in ran}


@pytest.mark.parametrize("case", mostly_slow(CASES, *FAST))
def test_a_published_model_lowers(case) -> None:
    device, recipe, program = case.split()
    ran = lowered(MODELS["qwen2_vl-7b"], device, recipe, program)
    assert any(form.startswith(("pallas", "flash", "decode")) for _, form in ran), ran


@pytest.mark.parametrize(
    ("device", "kernel"),
    [("h100", ("attention", "flash_gpu")), ("tpu-v5e", ("attention of rows", "pallas_tpu"))],
)
def test_a_tower_with_windows_lowers(device, kernel) -> None:
    assert kernel in lowered(QWEN2_5, device, "w4a8", "vision")
