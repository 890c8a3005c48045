"""Compile full-size models for accelerators ahead of time, from shapes alone.

    python -m benchmarks.aot --target tpu-v5e [--model qwen2_vl-7b] [--json] [--save FILE]

Compiles the vision tower, prefill (one prompt with one picture, tower included) and decode (one row
against the cache) for one chip, in three variants: bf16, W4A8 with one activation scale per token
computed at run time (dynamic), and W4A8 with static scales (ours). Reports whether each program
compiles and fits, XLA's cycle estimates (TPU; loop bodies times their trip counts), bytes moved to
and from main memory, operations, and times at the published rates. A ratio is ours / the other's:
below 1 ours is cheaper. No weights and no accelerator are needed, only its compiler: the extras
aot-tpu and aot-gpu.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from benchmarks.aot.backend import prepare, sharding
from benchmarks.aot.devices import DEVICES, Device
from benchmarks.aot.programs import PROGRAMS, Setup, compile_program, prompt
from benchmarks.aot.report import DYNAMIC, FLOAT, STATIC, figures, memory_of, ratios, table
from benchmarks.aot.sizes import MODELS
from benchmarks.output import add_output_options, deliver
from mquant_jax.cli_support import OK, Parser, run_cli
from mquant_jax.errors import UserError
from mquant_jax.models.registry import family_for
from mquant_jax.presets import PRESETS

RECIPES = {FLOAT: "float", DYNAMIC: "w4a8-dynamic", STATIC: "w4a8"}
NOTES = {
    "tpu": [
        "cycles: XLA's estimates of compute. charged: the part added for data movement that has "
        "no estimate (or one below its bytes at the memory's rate).",
        "estimate: the larger of cycles and bytes at the memory's rate; nothing here was run.",
    ],
    "gpu": [
        "No cycle estimates on this target. estimate: the sum over kernels of the larger of "
        "operations and bytes at published rates; real kernels do not reach these rates.",
        "Bytes count every kernel's operands once, as if nothing stayed in the caches; Pallas "
        "kernels count by their cost estimates.",
        "in_place: without the copies that XLA makes of a stack's layers, on both sides.",
    ],
}


def measure(
    target: str, model: str, tokens: int, side: int, slots: int, chosen: tuple[str, ...],
    programs: tuple[str, ...], top: int,
) -> dict[str, Any]:  # fmt: skip
    """Compile everything and return the JSON object; ``top`` > 0 lists costly instructions."""
    device = DEVICES[target]
    prepare(device)
    where = sharding(device)
    family = family_for(MODELS[model], model)
    config = family.config_from_hf(MODELS[model])
    try:
        batch = prompt(family, config, tokens, side)
    except ValueError as e:
        raise UserError(f"--tokens {tokens} --image-side {side}: {e}") from e
    setup = Setup(family, config, batch, slots)
    variants: dict[str, Any] = {}
    notes = list(NOTES[device.platform])
    for name in chosen:
        variants[name] = {}
        for program in programs:
            print(f"compiling {name} {program} for {device.name}", file=sys.stderr)
            made = compile_program(setup, PRESETS[RECIPES[name]], program, device, where)
            variants[name][program] = figures(made, device)
            for cycles, what, shape in made.cost.top[:top]:
                print(f"  {cycles / 1e6:9.2f}M {what:<44} {shape}", file=sys.stderr)
            if made.cost.kernel_cycles:
                share = made.cost.kernel_cycles / made.cost.cycles
                notes.append(
                    f"{name} {program}: {share:.0%} of the cycles are Pallas kernels, counted by "
                    "their cost estimates at published rates."
                )
            if made.error:
                notes.append(
                    f"{name} {program}: refused for lack of memory; figures are scaled up from the "
                    "same program with fewer layers."
                )
    memory = {name: memory_of(p, device) for name, p in variants.items()}
    ours = variants.get(STATIC, {})
    return {
        "target": target,
        "device": device.name,
        "model": model,
        "jax": jax.__version__,
        "clock_hz": device.clock,
        "prompt": {
            "tokens": batch.input_ids.shape[1],
            "visual_tokens": int((batch.token_class == 1).sum()),
            "image_side": side,
        },
        "cache_slots": slots,
        "compiled": bool(ours) and all(p["compiled"] for p in ours.values()),
        "variants": variants,
        "memory": memory,
        "ratios": ratios(variants, memory),
        "notes": notes,
    }


def rates(device: Device) -> str:
    """Format one line about a device."""
    return (
        f"{device.name}: {device.memory / 1e9:.0f} GB at {device.bandwidth / 1e9:.0f} GB/s, "
        + ", ".join(f"{kind} {rate / 1e12:.0f} T/s" for kind, rate in device.rates.items())
    )


def _run(argv: list[str]) -> int:
    epilog = "\n".join(rates(d) for d in DEVICES.values())
    parser = Parser("python -m benchmarks.aot", __doc__ or "", epilog)
    add = parser.add_argument
    add("--target", required=True, choices=tuple(DEVICES), help="chip to compile for")
    add("--model", default="qwen2_vl-7b", choices=tuple(MODELS), help="default qwen2_vl-7b")
    add(
        "--tokens",
        type=int,
        default=1024,
        metavar="N",
        help="prompt length, picture included (1024)",
    )
    add("--image-side", type=int, default=448, metavar="PX", help="picture size (448)")
    add("--cache", type=int, default=8192, metavar="N", help="cache slots (8192)")
    add("--variant", action="append", choices=tuple(RECIPES), help="only this one; repeatable")
    add("--program", action="append", choices=PROGRAMS, help="only this one; repeatable")
    add("--top", type=int, default=0, metavar="N", help="list the N costliest instructions of each "
        "program on stderr (TPU)")  # fmt: skip
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in ("tokens", "image_side", "cache"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.cache < args.tokens:
        raise UserError(f"--cache {args.cache} does not hold a prompt of {args.tokens} tokens")
    result = measure(
        args.target, args.model, args.tokens, args.image_side, args.cache,
        tuple(args.variant or RECIPES), tuple(args.program or PROGRAMS), args.top,
    )  # fmt: skip
    deliver(result, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
