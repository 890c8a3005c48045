"""Ahead-of-time cost model: HLO parser, roofline, ratios; and one real compilation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.aot import backend, cost, hlo, occupancy, report
from benchmarks.aot.__main__ import _run
from benchmarks.aot.data_parallel import collectives
from benchmarks.aot.devices import DEVICES
from benchmarks.aot.programs import Program, flop_count, prompt, size
from benchmarks.aot.sizes import MODELS
from mquant_jax.cli_support import run_cli
from mquant_jax.models.registry import family_for

V5E = DEVICES["tpu-v5e"]
PER_CYCLE = 819e9 / 1.5e9  # bytes

# A transfer and a kernel, then a loop over two layers: a product with one layer's slice of the
# weights, a layout change without a cost estimate, and an in-place cache update.
TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_computation (p0: s4[2,64,128], p1: s32[], p2: s8[8,128]) -> s32[8,64] {
  %p0 = s4[2,64,128]{2,1,0:T(64,128)(8,1)E(4)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = s4[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %flat = s4[64,128]{1,0} bitcast(%slice)
  %p2 = s8[8,128]{1,0:T(32,128)(4,1)S(1)} parameter(2)
  ROOT %dot = s32[8,64]{1,0:T(8,128)S(1)} convolution(%p2, %flat), dim_labels=bf_oi->bf
}

%fused_computation.1 (q0: bf16[2,512,64], q1: s32[], q2: bf16[1,1,64]) -> bf16[2,512,64] {
  %q0 = bf16[2,512,64]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = bf16[1,1,64]{2,1,0} parameter(2)
  ROOT %put = bf16[2,512,64]{2,1,0} dynamic-update-slice(%q0, %q2, %q1, %q1, %q1)
}

%condition (c: (s32[], s8[8,128], s4[2,64,128], bf16[2,512,64])) -> pred[] {
  %c = (s32[], s8[8,128]{1,0:S(1)}, s4[2,64,128]{2,1,0}, bf16[2,512,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(2)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], s8[8,128], s4[2,64,128], bf16[2,512,64])) -> (s32[], s8[8,128], s4[2,64,128], bf16[2,512,64]) {
  %b = (s32[], s8[8,128]{1,0:S(1)}, /*index=2*/s4[2,64,128]{2,1,0}, bf16[2,512,64]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = s8[8,128]{1,0:T(32,128)(4,1)S(1)} get-tuple-element(%b), index=1
  %w = s4[2,64,128]{2,1,0:T(64,128)(8,1)E(4)} get-tuple-element(%b), index=2
  %kv = bf16[2,512,64]{2,1,0} get-tuple-element(%b), index=3
  %product = s32[8,64]{1,0:T(8,128)S(1)} fusion(%w, %i.1, %x), kind=kOutput, calls=%fused_computation, metadata={op_name="jit(f)/while/body/dot_general" stack_frame_id=1}, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"1000"}}
  %turned = f32[64,4096]{1,0:T(8,128)S(1)} reshape(%product)
  %new = bf16[1,1,64]{2,1,0} bitcast(%x)
  %kv.1 = bf16[2,512,64]{2,1,0} fusion(%kv, %i.1, %new), kind=kLoop, calls=%fused_computation.1, backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %t = (s32[], s8[8,128]{1,0:S(1)}, s4[2,64,128]{2,1,0}, bf16[2,512,64]{2,1,0}) tuple(%i.1, %x, %w, %kv.1)
}

ENTRY %main (a: s8[8,128], w0: s4[2,64,128], kv0: bf16[2,512,64]) -> bf16[2,512,64] {
  %a = s8[8,128]{1,0:T(32,128)(4,1)} parameter(0), metadata={op_name="a (odd \\"name\\")"}
  %w0 = s4[2,64,128]{2,1,0} parameter(1)
  %kv0 = bf16[2,512,64]{2,1,0} parameter(2)
  %copy-start = (s8[8,128]{1,0:S(1)}, s8[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = s8[8,128]{1,0:S(1)} copy-done(%copy-start)
  %kernel = s8[8,128]{1,0:S(1)} custom-call(%copy-done), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"flops":"394000000","transcendentals":"0","bytes_accessed":"2048"}}}
  %zero.1 = s32[]{:T(128)} constant(0)
  %start = (s32[], s8[8,128]{1,0:S(1)}, s4[2,64,128]{2,1,0}, bf16[2,512,64]{2,1,0}) tuple(%zero.1, %kernel, %w0, %kv0)
  %loop = (s32[], s8[8,128]{1,0:S(1)}, s4[2,64,128]{2,1,0}, bf16[2,512,64]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[2,512,64]{2,1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_reading() -> None:
    module = hlo.parse(TEXT)
    assert module.entry.name == "main" and module.entry.root.name == "out"
    start = module.entry.instructions["copy-start"]
    assert [(a.dtype, a.dims, a.space) for a in start.arrays] == [
        ("s8", (8, 128), 1), ("s8", (8, 128), 0), ("u32", (), 2),
    ]  # fmt: skip
    assert start.operands == ("a",)
    product = module.computations["body"].instructions["product"]
    assert product.cycles == 1000 and product.source.endswith("dot_general")
    assert product.operands == ("w", "i.1", "x") and product.called["calls"]
    assert hlo.Array("s4", (3, 3)).bytes == 5 and hlo.Array("f8e4m3fn", (4,)).bytes == 4
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_trip_counts() -> None:
    module = hlo.parse(TEXT)
    assert hlo.trip_count(module, module.entry.instructions["loop"]) == 2
    noted = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    module = hlo.parse(noted)
    assert hlo.trip_count(module, module.entry.instructions["loop"]) == 5
    for odd in ("direction=GT", "direction=NE"):
        module = hlo.parse(TEXT.replace("direction=LT", odd))
        with pytest.raises(ValueError, match="no trip count for loop %loop"):
            cost.program_cost(module, V5E)


@pytest.mark.parametrize("trips", [None, {2: 28}])
def test_sums(trips) -> None:
    n = 28 if trips else 2
    total = cost.program_cost(hlo.parse(TEXT), V5E, trips)
    # 394e6 int8 operations take one microsecond: 1500 cycles.
    kernel, turned = 1500, (8 * 64 * 4 + 64 * 4096 * 4) / PER_CYCLE
    assert total.kernel_cycles == pytest.approx(kernel)
    assert total.charged == pytest.approx(n * turned)
    assert total.cycles == pytest.approx(kernel + n * (1000 + 10 + turned))
    # Per layer: int4 weights, the layer index, the new cache slot read and written, the scalars of
    # the loop condition. Once: the input.
    layer = 64 * 128 // 2 + 4 + (64 * 2 + 64 * 2 + 4) + (4 + 4 + 1)
    assert total.bytes == 8 * 128 + n * layer
    assert total.top[0][1] == "turned" and len(total.top) == 4


def test_a_kernel_must_tell_what_it_costs() -> None:
    at = TEXT.index(',"cost_estimate"')
    text = TEXT[:at] + TEXT[TEXT.index("}}", at) + 1 :]
    with pytest.raises(ValueError, match="kernel %kernel has no cost estimate"):
        cost.program_cost(hlo.parse(text), V5E)


def test_kernels_are_charged_as_scheduled_and_read_what_they_say() -> None:
    """The kernel's 1500 cycles are scaled by its factor, and its operand counts only the bytes that
    the kernel's estimate claims."""
    text = TEXT.replace("%kernel", "%attend_rows.3")
    text = text.replace("s8[8,128]{1,0:S(1)} custom-call", "s8[8,128]{1,0} custom-call")
    for target, factors in (("tpu-v5e", cost.SCHEDULES), ("tpu-v6e", cost.SCHEDULES_V6E)):
        device = DEVICES[target]
        plain = 394e6 / device.rates["int8"] * device.clock
        total = cost.program_cost(hlo.parse(text), device)
        assert total.kernel_cycles == pytest.approx(plain * factors["attend_rows"])
    few = text.replace('"bytes_accessed":"2048"', '"bytes_accessed":"100"')
    saved = total.bytes - cost.program_cost(hlo.parse(few), device).bytes
    assert saved == 8 * 128 - 100


# One layer: a slice of the stack is copied, a fused product reads it, a kernel reads another stack.
GPU_TEXT = """\
HloModule jit_f, is_scheduled=true

%cut (p0: s8[8,64,128], p1: s32[]) -> s8[1,64,128] {
  %p0 = s8[8,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = s8[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%inner (q0: s8[32,128], q1: s8[64,128]) -> f32[32,64] {
  %q0 = s8[32,128]{1,0} parameter(0)
  %q1 = s8[64,128]{1,0} parameter(1)
  %dot = s32[32,64]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %float = f32[32,64]{1,0} convert(%dot)
}

ENTRY %main (x: s8[32,128], w: s8[8,64,128], v: u8[8,64,64], l: s32[]) -> bf16[32,64] {
  %x = s8[32,128]{1,0} parameter(0)
  %w = s8[8,64,128]{2,1,0} parameter(1)
  %v = u8[8,64,64]{2,1,0} parameter(2)
  %l = s32[] parameter(3)
  %copied = s8[1,64,128]{2,1,0} fusion(%w, %l), kind=kCustom, calls=%cut, backend_config={"fusion_backend_config":{"kind":"__custom_fusion","custom_fusion_config":{"name":"dynamic_slice_fusion","kernel_index":0}}}
  %flat = s8[64,128]{1,0} bitcast(%copied)
  %product = f32[32,64]{1,0} fusion(%x, %flat), kind=kCustom, calls=%inner, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  ROOT %kernel = bf16[32,64]{1,0} custom-call(%l, %x, %v), custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI, backend_config={debug = false, ir = "ML\\22R", serialized_metadata = "{\\22flops\\22: \\221979000000\\22, \\22bytes_accessed\\22: \\223352\\22}"}
}
"""  # noqa: E501


def test_targets_without_cycles_add_up_kernels() -> None:
    h100 = DEVICES["h100"]
    module = hlo.parse(GPU_TEXT)
    total = cost.program_cost(module, h100)
    layer, product = 64 * 128, 32 * 128 + 64 * 128 + 32 * 64 * 4
    assert total.cycles == 0 and total.bytes == 2 * layer + 4 + product + 3352
    # The kernel is compute-bound (one microsecond); the rest is memory-bound.
    assert total.copying == pytest.approx((2 * layer + 4) / 3352e9)
    assert total.seconds == pytest.approx(total.copying + product / 3352e9 + 1e-6)
    fused = module.entry.instructions["product"]
    assert cost.products(module, module.entry, fused) == {"int8": 2 * 32 * 128 * 64}
    text = GPU_TEXT[: GPU_TEXT.index(", serialized")] + "}\n}\n"
    with pytest.raises(ValueError, match="kernel %kernel has no cost estimate"):
        cost.program_cost(hlo.parse(text), h100)


def test_copies_are_told_apart() -> None:
    def made_for(seconds: float, copying: float) -> dict:
        cost_ = cost.Cost(seconds=seconds, copying=copying, bytes=1e6)
        program = Program(True, {"total": 1.0}, cost_, {"int8": 1e9})
        return {"decode": report.figures(program, DEVICES["h100"])}

    variants = {"bf16": made_for(9.0, 4.0), "w4a8-static": made_for(2.0, 1.0)}
    ratios = report.ratios(variants, {})
    assert ratios["decode_seconds_static_vs_bf16"] == pytest.approx(2 / 9)
    assert ratios["decode_seconds_in_place_static_vs_bf16"] == pytest.approx(1 / 5)
    assert "decode_seconds_in_place_static_vs_dynamic" not in ratios
    tpu = {name: {"decode": made(3e6, 6e9)} for name in variants}
    assert not [key for key in report.ratios(tpu, {}) if "in_place" in key]


def test_a_kernels_figures(monkeypatch, tmp_path) -> None:
    """Registers and spills come from the assembler's log, and occupancy follows from them."""
    said = "0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nUsed 100 registers"
    monkeypatch.setattr(
        occupancy.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", said)
    )
    ptx = tmp_path / "k.ptx"
    ptx.write_text(".reqntid 256, 1, 1\n wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 ...")
    kernel = occupancy.read_kernel(ptx, "1: w4a8 grid: [1] threads: [256] shared_memory: 65536 b")
    assert kernel == occupancy.Kernel(256, 100, 12, 65536, "wgmma") and kernel.resident == 2
    blocks = occupancy.Blocks(128, 128, 64, 8, 3)
    shape = True, 1024, 3584, 3584, blocks
    assert occupancy.score(kernel, *shape) == np.inf
    kernel = dataclasses.replace(kernel, spills=0)
    published = 2 * 1024 * 3584 * 3584 / 1979e12 * 1e6
    assert published < occupancy.score(kernel, *shape) < 4 * published
    few = dataclasses.replace(blocks, rows=16, splits=4)
    least = 3584 * 1792 / 3352e9 * 1e6
    assert least < occupancy.score(kernel, False, 1, 3584, 3584, few) < 6 * least


def test_operations_of_a_traced_program() -> None:
    def program(x, w, f):
        def layer(carry, one):
            y = jax.lax.dot_general(
                x, one, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )
            return carry + y.sum(), None

        total, _ = jax.lax.scan(layer, jnp.int32(0), w)
        return total, jax.jit(lambda f: f @ f.T)(f)

    s = jax.ShapeDtypeStruct
    shapes = s((4, 8), jnp.int8), s((3, 16, 8), jnp.int4), s((2, 5), jnp.bfloat16)
    counted = flop_count(jax.make_jaxpr(program)(*shapes).jaxpr)
    assert counted == {"int8": 3 * 2 * 4 * 8 * 16, "bf16": 2 * 2 * 5 * 2}
    assert size(shapes) == 4 * 8 + 3 * 16 * 8 // 2 + 2 * 5 * 2


def made(cycles: float, total: float, compiled=True, nbytes=8.19e9) -> dict:
    program = Program(
        compiled, {"arguments": total, "total": total}, cost.Cost(cycles=cycles, bytes=nbytes),
        {"int8": 394e9, "bf16": 197e9}, None if compiled else "RESOURCE_EXHAUSTED",
    )  # fmt: skip
    return report.figures(program, V5E)


def test_roofline_and_ratios() -> None:
    figures = made(30e6, 5e9)
    seconds = figures["seconds"]
    assert seconds["compute"] == pytest.approx(2e-3) and seconds["memory"] == pytest.approx(1e-2)
    assert seconds["roofline"] == pytest.approx(1e-2) and seconds["estimate"] == pytest.approx(2e-2)
    variants = {
        "bf16": {"prefill": made(60e6, 20e9, False), "decode": made(9e6, 17e9, nbytes=16.38e9)},
        "w4a8-static": {"prefill": figures, "decode": made(3e6, 6e9)},
    }
    memory = {name: report.memory_of(p, V5E) for name, p in variants.items()}
    assert memory["bf16"] == {
        "needs": 20e9, "in": "prefill", "device": 16e9, "fits_one_chip": False,
    }  # fmt: skip
    assert memory["w4a8-static"]["in"] == "decode" and memory["w4a8-static"]["fits_one_chip"]
    ratios = report.ratios(variants, memory)
    assert ratios["prefill_cycles_static_vs_bf16"] == pytest.approx(0.5)
    assert ratios["decode_bytes_static_vs_bf16"] == pytest.approx(0.5)
    assert ratios["prefill_cycles_static_vs_dynamic"] is None
    assert ratios["fits_one_chip"] is True and ratios["vision_seconds_static_vs_bf16"] is None
    result = {
        "model": "m", "device": "d", "clock_hz": 1.5e9, "cache_slots": 8,
        "prompt": {"tokens": 4, "visual_tokens": 2}, "variants": variants, "memory": memory,
        "ratios": ratios, "notes": ["a note"],
    }  # fmt: skip
    text = report.table(json.loads(json.dumps(result)))
    assert "DOES NOT FIT" in text and "a note" in text
    assert "NO" in next(line for line in text.splitlines() if line.startswith("bf16 "))


@pytest.mark.parametrize("name", MODELS)
def test_prompts_have_the_asked_length(name) -> None:
    family = family_for(MODELS[name])
    config = family.config_from_hf(MODELS[name])
    batch = prompt(family, config, 1024, 448)
    assert batch.input_ids.shape == (1, 1024) and batch.vision is not None
    assert (np.asarray(batch.order) >= 0).all()
    with pytest.raises(ValueError, match="leaves no text"):
        prompt(family, config, 20, 448)


def test_bad_usage(capsys, monkeypatch) -> None:
    assert run_cli(_run, ["--target", "tpu-v5e", "--tokens", "0"]) == 2
    assert "--tokens must be 1 or more" in capsys.readouterr().err
    assert run_cli(_run, ["--target", "tpu-v5e", "--cache", "10"]) == 2
    assert "--cache 10 does not hold a prompt of 1024 tokens" in capsys.readouterr().err
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    for target, package in (("tpu-v6e", "libtpu: pip install"), ("h100", "jax-cuda13-plugin: pip")):
        assert run_cli(_run, ["--target", target]) == 2
        assert package in capsys.readouterr().err


def test_a_compiler_of_another_jax(monkeypatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "_version", lambda name: "0.0.1")
    for target in ("tpu-v5e", "h100"):
        assert "is not the one that jax" in (backend.missing(DEVICES[target]) or "")
    wanted = backend._wanted_libtpu()
    assert wanted and wanted.startswith("0.0.")
    monkeypatch.setattr(backend, "_version", lambda name: wanted.replace("*", "7"))
    assert backend.missing(DEVICES["tpu-v5e"]) is None


@pytest.mark.skipif(
    backend.missing(V5E) is not None, reason=f"no TPU compiler: {backend.missing(V5E)}"
)
def test_a_real_compile(tmp_path) -> None:
    """Compile the smallest program of the smallest model, in a new process with a fresh JAX."""
    saved = tmp_path / "result.json"
    command = [
        sys.executable, "-m", "benchmarks.aot", "--target", "tpu-v5e", "--model", "qwen2_vl-2b",
        "--program", "decode", "--json", "--save", str(saved),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result == json.loads(saved.read_text())
    assert result["compiled"] and result["ratios"]["fits_one_chip"]
    assert result["ratios"]["decode_bytes_static_vs_bf16"] < 0.4
    ours = result["variants"]["w4a8-static"]["decode"]
    # All weights except the embedding, and the cache, are read once.
    held = ours["memory"]["arguments"]
    assert 0.3 * held < ours["bytes"] < held


@pytest.mark.skipif(
    backend.missing(V5E) is not None, reason=f"no TPU compiler: {backend.missing(V5E)}"
)
def test_data_parallel_programs_hold_no_collective() -> None:
    command = [sys.executable, "-m", "benchmarks.aot.data_parallel", "--target", "tpu-v5e"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["chips"] == 4
    assert result["collectives"] == {"see": [], "begin": [], "decode": []}


def test_collectives_are_found() -> None:
    text = """HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = f32[8]{0} all-reduce-start(f32[8]{0} %p), to_apply=%add
  ROOT %d = f32[8]{0} all-reduce-done(f32[8]{0} %s)
}
"""
    assert collectives(text) == ["all-reduce-start", "all-reduce-done"]


@pytest.mark.skipif(
    backend.missing(DEVICES["h100"]) is not None,
    reason=f"no CUDA compiler: {backend.missing(DEVICES['h100'])}",
)
def test_real_gpu_kernels() -> None:
    """With the default block sizes, both kernels use the int8 tensor cores of an H100 and spill
    no registers."""
    program = """
import json
from benchmarks.aot.backend import prepare, sharding
from benchmarks.aot.devices import DEVICES
from benchmarks.aot.occupancy import Blocks, compile_kernel
from mquant_jax.ops import gpu
prepare(DEVICES["h100"])
where = sharding(DEVICES["h100"])
for rows in (1, 40, 1000):
    choice = gpu.choose(rows, 4000, 1001)
    made = compile_kernel(choice.path == gpu.MANY, rows, 4000, 1001, Blocks(*choice.blocks), where)
    print(json.dumps([choice.path, made.tensor, made.spills, made.shared]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["pallas_gpu_gemv", "pallas_gpu", "pallas_gpu"]
    assert all(row[1:3] == ["wgmma", 0] and row[3] <= 99 * 1024 for row in rows), rows


def test_devices_say_what_they_are() -> None:
    for device in DEVICES.values():
        assert device.rates["int8"] >= 1.99 * device.rates["bf16"]
        assert dataclasses.replace(device, clock=1e9).bytes_per_cycle == device.bandwidth / 1e9
