"""Format figures of compiled programs as JSON, ratios and a table."""

from __future__ import annotations

from typing import Any

from benchmarks.aot.devices import Device
from benchmarks.aot.programs import PROGRAMS, Program

STATIC, DYNAMIC, FLOAT = "w4a8-static", "w4a8-dynamic", "bf16"


def figures(program: Program, device: Device) -> dict[str, Any]:
    """Return one program's figures as plain numbers.

    ``cycles`` (TPU) with its parts ``charged_cycles`` and ``kernel_cycles``, bytes, operations, and
    seconds: ``compute`` (operations) and ``memory`` (bytes) at published rates, ``roofline`` (the
    larger of the two) and ``estimate`` (the larger of cycles and memory). On targets without
    cycles, ``estimate`` is the sum of each kernel's own roofline and ``copying`` is a part of it,
    see :class:`~benchmarks.aot.cost.Cost`.
    """
    cost = program.cost
    compute, memory = device.compute_seconds(program.flops), cost.bytes / device.bandwidth
    seconds = {"compute": compute, "memory": memory, "roofline": max(compute, memory)}
    seconds |= {"estimate": cost.seconds, "copying": cost.copying}
    out: dict[str, Any] = {"compiled": program.compiled}
    if program.error:
        out["error"] = program.error
    if device.clock:
        out |= {
            "cycles": round(cost.cycles),
            "charged_cycles": round(cost.charged),
            "kernel_cycles": round(cost.kernel_cycles),
        }
        del seconds["copying"]
        seconds["estimate"] = max(cost.cycles / device.clock, memory)
    return out | {
        "bytes": round(cost.bytes),
        "flops": {k: round(v) for k, v in program.flops.items()},
        "seconds": seconds,
        "memory": {k: round(v) for k, v in program.memory.items()},
    }


def memory_of(programs: dict[str, dict[str, Any]], device: Device) -> dict[str, Any]:
    """Return the memory a variant needs on the device: that of its largest program."""
    worst = max(programs, key=lambda name: programs[name]["memory"]["total"])
    needs = programs[worst]["memory"]["total"]
    compiled = all(p["compiled"] for p in programs.values())
    return {
        "needs": needs,
        "in": worst,
        "device": round(device.memory),
        "fits_one_chip": compiled and needs <= device.memory,
    }


def ratios(variants: dict[str, dict[str, Any]], memory: dict[str, Any]) -> dict[str, Any]:
    """Return ours / the others' (less than 1: ours is cheaper); ``None`` where one is missing.

    ``in_place`` ratios leave out the copying of layers on both sides, where it is known.
    """

    def over(program: str, other: str, *keys: str) -> float | None:
        values = []
        for name in (STATIC, other):
            value: Any = variants.get(name, {}).get(program)
            for key in keys:
                value = value.get(key) if value else None
            values.append(value)
        ours, theirs = values
        return ours / theirs if ours and theirs else None

    out: dict[str, Any] = {
        "prefill_cycles_static_vs_bf16": over("prefill", FLOAT, "cycles"),
        "prefill_cycles_static_vs_dynamic": over("prefill", DYNAMIC, "cycles"),
        "decode_bytes_static_vs_bf16": over("decode", FLOAT, "bytes"),
        "fits_one_chip": memory.get(STATIC, {}).get("fits_one_chip"),
    }
    for program in PROGRAMS:
        for other, short in ((FLOAT, "bf16"), (DYNAMIC, "dynamic")):
            out[f"{program}_seconds_static_vs_{short}"] = over(
                program, other, "seconds", "estimate"
            )
            ours, theirs = (_in_place(variants, name, program) for name in (STATIC, other))
            if ours and theirs:
                out[f"{program}_seconds_in_place_static_vs_{short}"] = ours / theirs
    return out


def _in_place(variants: dict[str, dict[str, Any]], name: str, program: str) -> float | None:
    """Return the seconds without copying layers out of their stacks; ``None`` if unknown."""
    seconds = variants.get(name, {}).get(program, {}).get("seconds", {})
    return seconds["estimate"] - seconds["copying"] if "copying" in seconds else None


def table(result: dict[str, Any]) -> str:
    """Format the result as text."""
    cycles = result["clock_hz"] is not None
    prompt = result["prompt"]
    lines = [
        f"{result['model']} on one {result['device']}: prompt {prompt['tokens']} tokens, "
        f"{prompt['visual_tokens']} of them visual; cache {result['cache_slots']} slots",
        "",
        f"{'variant':<13} {'program':<8} {'compiles':<8} {'memory GB':>9} "
        + (f"{'Mcycles':>8} {'charged':>8} " if cycles else "")
        + f"{'GB moved':>9} {'Tops':>7} {'compute ms':>10} {'memory ms':>9} {'estimate ms':>11}",
    ]
    for name, programs in result["variants"].items():
        for program, p in programs.items():
            ms = {k: v * 1e3 for k, v in p["seconds"].items()}
            estimates = ""
            if cycles:
                estimates = f"{p['cycles'] / 1e6:>8.1f} {p['charged_cycles'] / 1e6:>8.1f} "
            lines.append(
                f"{name:<13} {program:<8} {'yes' if p['compiled'] else 'NO':<8} "
                f"{p['memory']['total'] / 1e9:>9.2f} {estimates}{p['bytes'] / 1e9:>9.2f} "
                f"{sum(p['flops'].values()) / 1e12:>7.2f} {ms['compute']:>10.2f} "
                f"{ms['memory']:>9.2f} {ms['estimate']:>11.2f}"
            )
    lines.append("")
    for name, m in result["memory"].items():
        verdict = "fits" if m["fits_one_chip"] else "DOES NOT FIT"
        lines.append(
            f"{name:<13} needs {m['needs'] / 1e9:.2f} of {m['device'] / 1e9:.0f} GB "
            f"({m['in']}): {verdict}"
        )
    lines.append("")
    lines += [f"{k:<42} {v if v is None or isinstance(v, bool) else f'{v:.3f}'}"
              for k, v in result["ratios"].items()]  # fmt: skip
    return "\n".join([*lines, "", *result["notes"]])
