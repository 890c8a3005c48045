"""Rank candidate block sizes of a GPU product from their compiled kernels alone.

The compiler's PTX goes through ``ptxas``, which reports registers and spills. Together with the
program's shared memory, they say how many blocks fit on a multiprocessor. The rest is arithmetic on
published or commonly measured rates: it gives a ranking, not a time.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from benchmarks.aot.devices import DEVICES
from mquant_jax.numerics import QTensor
from mquant_jax.ops.epilogue import Epilogue
from mquant_jax.ops.gpu import FEW_ROWS
from mquant_jax.ops.pallas_gpu import Blocks, matmul, partial_sums

SMS, THREADS, REGISTERS, SHARED = 132, 2048, 65536, 232448  # H100; all but SMS per multiprocessor
SMALL_SHARED = 99 * 1024  # bytes per block on the smallest supported chip
CLOCK = 1.755e9
MACS = 1979e12 / 2 / SMS / CLOCK  # int8, per multiprocessor and cycle
L2_BYTES = 5.5e12 / SMS / CLOCK  # per multiprocessor and cycle; a common measurement, not published
UNPACK = 3 / 4 / 128  # cycles per byte of packed weights: three operations on four at a time
LATENCY = 800e-9  # seconds of a main memory read; a common measurement


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The compiled kernel of a candidate."""

    threads: int
    registers: int
    spills: int
    shared: int
    tensor: str

    @property
    def resident(self) -> int:
        """Number of blocks resident on a multiprocessor at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = self.shared + 1024
        return min(THREADS // self.threads, REGISTERS // registers, SHARED // shared)


def compile_kernel(
    many: bool, rows: int, out: int, k: int, blocks: Blocks, where: Sharding
) -> Kernel | None:
    """Compile a candidate for one shape for an H100; return ``None`` if the compiler refuses it."""

    def one(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def whole(x, w, x_scale, w_scale):
        return matmul(QTensor(x, x_scale), w, w_scale, blocks, Epilogue(dtype=jnp.bfloat16))

    def parts(x, w, x_scale, w_scale):
        return partial_sums(x, w, blocks)

    args = (
        one((rows, k), jnp.int8), one((out, -(-k // 2)), jnp.uint8),
        one((rows, 1), jnp.float32), one((out, 1), jnp.float32),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder}
        try:
            jax.jit(whole if many else parts).lower(*args).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:
            return None
        ptx = max(glob.glob(f"{folder}/*.ptx"), key=lambda name: Path(name).stat().st_size)
        thunks = Path(glob.glob(f"{folder}/*thunk_sequence.txt")[0]).read_text(encoding="utf-8")
        return read_kernel(Path(ptx), thunks)


def read_kernel(ptx: Path, thunks: str) -> Kernel:
    """Read the figures of a PTX file with one kernel, called ``w4a8`` in XLA's thunk list."""
    ptxas = subprocess.run(
        [assembler(), "-arch=sm_90a", "-v", str(ptx), "-o", "/dev/null"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    report, text = ptxas.stdout + ptxas.stderr, ptx.read_text(encoding="utf-8")
    launch = next(line for line in thunks.splitlines() if "w4a8" in line)
    return Kernel(
        threads=int(re.search(r"\.reqntid (\d+)", text).group(1)),
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        shared=int(re.search(r"shared_memory: (\d+)", launch).group(1)),
        tensor=next(iter(re.findall(r"(wgmma|mma)[.\w]*s32\.s8\.s8", text)), "none"),
    )


def assembler() -> str:
    """Return the ``ptxas`` of the wheel in this Python's prefix, or the one on the path."""
    found = glob.glob(f"{sys.prefix}/lib/python*/site-packages/nvidia/cu*/bin/ptxas")
    return found[0] if found else "ptxas"


def score(kernel: Kernel, many: bool, rows: int, out: int, k: int, blocks: Blocks) -> float:
    """Estimate microseconds by arithmetic; infinite if registers spill or no block fits.

    Many rows: blocks run in waves. A step takes as long as the slowest of tensor cores, unpacking
    and L2 reads, which resident blocks share. Few rows: the weights' bytes at the memory's rate, or
    at the rate that the reads in flight allow, plus a latency.
    """
    if kernel.spills or kernel.resident < 1:
        return math.inf
    half = -(-k // 2)
    tiles = math.ceil(out / blocks.out) * math.ceil(rows / blocks.rows) * blocks.splits
    steps = math.ceil(half / blocks.depth / blocks.splits)
    read = blocks.depth * (blocks.out + 2 * blocks.rows)
    if many:
        unpack = blocks.out * blocks.depth * UNPACK
        # Each warp group unpacks, then multiplies; two groups hide half of the unpacking.
        tensor = 2 * blocks.depth * blocks.out * blocks.rows / MACS + unpack / 2
        step = max(tensor, read / L2_BYTES)
        waves = math.ceil(tiles / SMS / kernel.resident) * kernel.resident
        return (waves * steps * step / CLOCK + LATENCY) * 1e6
    per_wave = min(tiles, SMS * kernel.resident)
    flowing = per_wave * (blocks.stages - 1) * blocks.depth * blocks.out
    rate = min(DEVICES["h100"].bandwidth, flowing / LATENCY)
    return (out * half / rate + 2 * LATENCY) * 1e6


def candidates(many: bool, rows: int) -> list[Blocks]:
    """Return the block sizes to consider."""
    if not many:
        return [
            Blocks(64, 16, depth, 4, stages, splits)
            for depth, stages in ((64, 4), (64, 6), (128, 4))
            for splits in (1, 2, 4, 8)
        ]
    tall = [n for n in (32, 64, 128, 256) if n < 2 * rows]
    return [
        Blocks(wide, high, depth, 8 if wide > 64 else 4, 3)
        for wide in (64, 128, 256)
        for high in tall
        for depth in (64, 128)
        if wide * high <= 256 * 128
    ]


def analyse(rows: int, out: int, k: int, where: Sharding) -> list[dict[str, Any]]:
    """Return ``blocks``, ``score_us`` and the kernel's figures for all candidates, best first.

    Candidates whose shared memory only the largest chips have are left out. Ties are broken by
    the least shared memory.
    """
    many, found = rows > FEW_ROWS, []
    for blocks in candidates(many, rows):
        kernel = compile_kernel(many, rows, out, k, blocks, where)
        if kernel is None or kernel.tensor == "none" or kernel.shared > SMALL_SHARED:
            continue
        us = score(kernel, many, rows, out, k, blocks)
        figures = dataclasses.asdict(kernel) | {"resident": kernel.resident}
        found.append({"blocks": list(dataclasses.astuple(blocks)), "score_us": us, **figures})
    return sorted(found, key=lambda entry: (entry["score_us"], entry["shared"]))
