"""Cost of a compiled program: XLA's cycle estimates and bytes moved, with loops counted in full.

``estimated_cycles`` in a TPU program's text covers compute only, for one run of the instruction.
Three kinds of work have no estimate and are charged here:

* data movement (reshapes, gathers, and copies, whose estimates are often impossibly low): at least
  the bytes read and written at the memory's rate;
* Pallas kernels: the larger of their bytes and their own operation counts at the published rates,
  scaled by how much longer their final schedule is (:data:`SCHEDULES`);
* transfers that run beside compute: bytes alone.

GPU programs have no estimates. Each kernel takes the larger of its operations and its bytes at the
published rates, and kernels run one after the other.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

from benchmarks.aot.devices import Device
from benchmarks.aot.hlo import Array, Computation, Instruction, Module, trip_count

HBM = 0
# Instructions without work of their own: they name or await results of others.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "copy-done", "slice-done", "async-done", "async-update", "partition-id", "replica-id",
    "opt-barrier", "broadcast",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "LayoutConstraint"}
_STARTS = {"copy-start", "slice-start", "async-start"}
_MOVES = {"copy", "reshape", "transpose", "concatenate", "reverse", "gather"}
TRITON = "__gpu$xla.gpu.triton"
_KERNELS = {"tpu_custom_call", TRITON, "mosaic_gpu_v2", "mosaic_gpu"}
_INTEGERS = ("s8", "u8", "s4", "u4")
# Bundles in a kernel's final schedule, times trips, divided by the cycles its operations take on
# the matrix units (``rms_quantize`` does not use them). The largest values from the compiler's
# dumps for v5e and v6e at Qwen2-VL-7B's shapes (docs/speed.md). v5p uses the values of v5e.
SCHEDULES = {"attend_rows": 1.72, "int4_dot": 1.02, "few_dot": 1.06, "rms_quantize": 55.0}
SCHEDULES_V6E = {"attend_rows": 6.0, "int4_dot": 1.9, "few_dot": 2.7, "rms_quantize": 220.0}
_SMALL = 4096  # bytes; smaller operations are scalar arithmetic, not data movement


@dataclasses.dataclass
class Cost:
    """Sums over a program.

    Attributes:
        cycles: compute, including everything below; 0 on targets without estimates.
        charged: the part of ``cycles`` charged here for data movement, not estimated by XLA.
        kernel_cycles: the part of ``cycles`` that comes from Pallas kernels' cost estimates.
        bytes: read from and written to main memory.
        seconds: the sum of all kernels' times, on targets without cycles.
        copying: the part of ``seconds`` spent on slicing layers out of their stacks for kernels
            that cannot read them in place.
        top: cycles by instruction: ``(cycles, name, shapes and source)``.
    """

    cycles: float = 0.0
    charged: float = 0.0
    kernel_cycles: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    copying: float = 0.0
    top: list[tuple[float, str, str]] = dataclasses.field(default_factory=list)


def program_cost(module: Module, device: Device, trips: dict[int, int] | None = None) -> Cost:
    """Return the cost of one run of a compiled program.

    Args:
        trips: trip counts to replace: a program compiled with fewer equal layers then stands for
            the whole one.

    Raises:
        ValueError: a loop has no known trip count, or a kernel has no cost estimate.
    """
    total = Cost()
    _add(total, module, module.entry, device, 1, trips or {})
    total.top.sort(reverse=True)
    return total


def _add(
    total: Cost, module: Module, body: Computation, device: Device, times: int, trips: dict
) -> None:
    for i in body.instructions.values():
        if i.opcode == "while":
            n = trip_count(module, i)
            for role in ("condition", "body"):
                inner = module.computations[i.called[role][0]]
                _add(total, module, inner, device, times * trips.get(n, n), trips)
        elif i.opcode == "conditional":
            costs = []
            for name in [n for names in i.called.values() for n in names]:
                costs.append(branch := Cost())
                _add(branch, module, module.computations[name], device, times, trips)
            worst = max(costs, key=lambda c: (c.cycles, c.seconds, c.bytes))
            for field in (f.name for f in dataclasses.fields(Cost)):
                setattr(total, field, getattr(total, field) + getattr(worst, field))
        elif i.opcode == "call":
            inner = module.computations[i.called["to_apply"][0]]
            _add(total, module, inner, device, times, trips)
        else:
            _add_one(total, module, body, i, device, times)


def _add_one(
    total: Cost, module: Module, body: Computation, i: Instruction, device: Device, times: int
) -> None:
    target = i.attribute("custom_call_target")
    if i.opcode in _FREE or target in _FREE_CALLS:
        return
    moved, in_memory = _traffic(module, body, i)
    if target in _KERNELS and (estimate := kernel_estimate(i.config)):
        # A kernel that fetches its layer from a stack reads less than the whole operand.
        in_memory = min(in_memory, float(estimate.get("bytes_accessed", in_memory)))
    cycles = float(i.cycles or 0)
    total.bytes += in_memory * times
    if device.clock is None:
        _add_seconds(total, module, body, i, device, times, in_memory)
        return
    if target in _KERNELS:
        cycles = kernel_cycles(i, operand_arrays(body, i), device)
        total.kernel_cycles += cycles * times
    elif i.opcode in _MOVES or (i.cycles is None and i.opcode not in _STARTS):
        least = moved / device.bytes_per_cycle if moved > _SMALL else 0.0
        total.charged += max(0.0, least - cycles) * times
        cycles = max(cycles, least)
    total.cycles += cycles * times
    if cycles:
        what = " ".join(_short(a) for a in i.arrays[:2])
        total.top.append((cycles * times, i.name, f"{what} {i.source[-60:]}"))


def _add_seconds(
    total: Cost, module: Module, body: Computation, i: Instruction, device: Device, times: int,
    moved: float,
) -> None:  # fmt: skip
    """Add one kernel of a target without cycle estimates."""
    if i.attribute("custom_call_target") == TRITON:
        integer = any(a.dtype in _INTEGERS for a in operand_arrays(body, i))
        flops = {"int8" if integer else "bf16": float(i.notes["flops"])}
    else:
        flops = products(module, body, i)
    seconds = max(device.compute_seconds(flops), moved / device.bandwidth) * times
    total.seconds += seconds
    if '"name":"dynamic_slice_fusion"' in i.attributes:
        total.copying += seconds
    what = " ".join(_short(a) for a in i.arrays[:2])
    total.top.append((seconds, i.name, f"{what} {i.source[-60:]}"))


def products(module: Module, body: Computation, i: Instruction) -> dict[str, float]:
    """Count the matrix products' operations in an instruction by operand type, including those
    inside fusions."""
    flops: collections.Counter = collections.Counter()
    if i.opcode == "dot":
        left = body.instructions[i.operands[0]].arrays[0]
        found = re.search(r"lhs_contracting_dims={([\d,]*)}", i.attributes)
        length = math.prod(left.dims[int(d)] for d in found.group(1).split(",") if d)
        flops["int8" if left.dtype in _INTEGERS else "bf16"] += 2.0 * length * i.arrays[0].size
    for name in i.called.get("calls", ()):
        inner = module.computations[name]
        for one in inner.instructions.values():
            flops.update(products(module, inner, one))
    return dict(flops)


def _short(a: Array) -> str:
    return f"{a.dtype}[{','.join(map(str, a.dims))}]" + ("" if a.space == HBM else f"@{a.space}")


def kernel_cycles(i: Instruction, operands: list[Array], device: Device) -> float:
    """Return a Pallas kernel's cycles: the larger of its operations, as scheduled, and its bytes.

    Operations count as int8 if any operand is int8 or int4, else as bf16.

    Raises:
        ValueError: the kernel has no cost estimate.
    """
    estimate = kernel_estimate(i.config)
    if estimate is None:
        raise ValueError(f"kernel %{i.name} has no cost estimate; give its pallas_call one")
    integer = any(a.dtype in _INTEGERS for a in operands)
    flops = float(estimate.get("flops", 0)) / device.rates["int8" if integer else "bf16"]
    schedules = SCHEDULES_V6E if device.name == "TPU v6e" else SCHEDULES
    flops *= schedules.get(i.name.partition(".")[0], 1.0)
    return max(flops, float(estimate.get("bytes_accessed", 0)) / device.bandwidth) * device.clock


def kernel_estimate(config: Any) -> dict | None:
    """Find the ``cost_estimate`` in a custom call's backend config."""
    if isinstance(config, dict):
        if isinstance(config.get("cost_estimate"), dict):
            return config["cost_estimate"]
        found = (kernel_estimate(v) for v in config.values())
        return next((f for f in found if f is not None), None)
    return None


def operand_arrays(body: Computation, i: Instruction) -> list[Array]:
    """Return the arrays that an instruction reads, tuples flattened."""
    return [a for name in i.operands for a in body.instructions[name].arrays]


def _traffic(module: Module, body: Computation, i: Instruction) -> tuple[float, float]:
    """Return the bytes that an instruction reads and writes: in any memory, and in main memory."""
    if i.attribute("custom_call_target") == TRITON:
        # Only the kernel's estimate says which parts of its operands it reads.
        if "bytes_accessed" not in i.notes:
            raise ValueError(
                f"kernel %{i.name} has no cost estimate; give its pallas_call metadata"
            )
        return 0.0, float(i.notes["bytes_accessed"])
    if i.opcode in _STARTS:
        # (destination, source, context): count the sides in main memory.
        whole = operand_arrays(body, i)
        size = min(sum(a.bytes for a in whole), _largest_result(i, whole))
        in_memory = [a for a in i.arrays if a.bytes and a.space == HBM]
        return 0.0, float(size * min(2, len(in_memory)))
    if i.opcode == "fusion":
        inner = module.computations[i.called["calls"][0]]
        pairs = [*_fusion_reads(module, body, i, inner), *_fusion_writes(i, inner)]
    elif i.opcode in ("dynamic-slice", "slice", "gather"):
        operand = body.instructions[i.operands[0]].arrays[0]
        pairs = [(operand, i.arrays[0].bytes), (i.arrays[0], i.arrays[0].bytes)]
    elif i.opcode == "dynamic-update-slice":
        update = body.instructions[i.operands[1]].arrays[0]
        pairs = [(update, update.bytes), (i.arrays[0], update.bytes)]
    else:
        pairs = [(a, a.bytes) for a in [*operand_arrays(body, i), *i.arrays]]
    anywhere = sum(n for _, n in pairs)
    return float(anywhere), float(sum(n for a, n in pairs if a.space == HBM))


def _largest_result(i: Instruction, operands: list[Array]) -> int:
    """Return the bytes that a transfer delivers: its result other than its operands, or a full
    copy."""
    rest = collections.Counter((a.dtype, a.dims) for a in i.arrays)
    rest.subtract((a.dtype, a.dims) for a in operands)
    new = [a.bytes for a in i.arrays if rest[a.dtype, a.dims] > 0]
    return max(new, default=math.inf)


def _fusion_reads(module: Module, body: Computation, i: Instruction, inner: Computation):
    """Yield each operand and the bytes a fusion reads of it: slices only, if it uses nothing
    else."""
    parameters = {int(p.arguments): p for p in _parameters(inner)}
    for k, name in enumerate(i.operands):
        for array in body.instructions[name].arrays:
            part = _read_of(module, inner, parameters[k].name) if k in parameters else None
            yield array, array.bytes if part is None else min(part, array.bytes)


def _read_of(module: Module, inner: Computation, name: str) -> int | None:
    """Return the bytes read of a value inside a fusion, or ``None`` for all of it."""
    if inner.instructions[name].root:
        return None
    total = 0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        part: int | None = None
        first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            part = user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and first and user.operands.count(name) == 1:
            part = 0  # written in place
        elif user.opcode in ("bitcast", "copy", "convert"):
            part = _read_of(module, inner, user.name)
        elif user.opcode == "fusion":
            part = _read_of_nested(module, inner, user, name)
        if part is None:
            return None
        total += part
    return total


def _read_of_nested(module: Module, inner: Computation, user: Instruction, name: str) -> int | None:
    """Like :func:`_read_of`, for a use by a fusion in a fusion, which is usually a layout
    change."""
    nested = module.computations[user.called["calls"][0]]
    parameters = {int(p.arguments): p for p in _parameters(nested)}
    taken = [parameters[k] for k, operand in enumerate(user.operands) if operand == name]
    parts = [_read_of(module, nested, p.name) for p in taken]
    if None not in parts:
        return sum(parts)
    same = len(user.operands) == 1 and user.arrays[0].size == taken[0].arrays[0].size
    return _read_of(module, inner, user.name) if same else None


def _parameters(body: Computation) -> list[Instruction]:
    return [i for i in body.instructions.values() if i.opcode == "parameter"]


def _fusion_writes(i: Instruction, inner: Computation):
    """Yield each result and the bytes a fusion writes to it: an in-place update writes only
    itself."""
    root = inner.root
    parts = [inner.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(i.arrays):
        parts = [root] * len(i.arrays)
    for array, part in zip(i.arrays, parts, strict=True):
        while part.opcode == "bitcast":
            part = inner.instructions[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            yield array, inner.instructions[part.operands[1]].arrays[0].bytes
        else:
            yield array, array.bytes
