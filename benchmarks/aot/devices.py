"""Published specifications of the target chips."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip.

    Attributes:
        name: the name in reports.
        platform: ``tpu`` or ``gpu``, as returned by ``jax.default_backend``.
        topology: JAX's name of the smallest slice with such chips.
        memory: bytes.
        bandwidth: bytes per second of that memory.
        rates: dense operations per second by operand type; a multiply-add counts as two.
        clock: cycles per second for XLA's cycle estimates; ``None`` where there are none.
            Chosen so that the matrix units reach the published bf16 rate.
    """

    name: str
    platform: str
    topology: str
    memory: float
    bandwidth: float
    rates: dict[str, float]
    clock: float | None = None

    @property
    def bytes_per_cycle(self) -> float:
        """Memory bytes per cycle of :attr:`clock`."""
        return self.bandwidth / self.clock

    def compute_seconds(self, flops: dict[str, float]) -> float:
        """Return the time of operations, given by operand type, at the published rates."""
        return sum(n / self.rates[kind] for kind, n in flops.items())


DEVICES = {
    "tpu-v5e": Device(
        "TPU v5e", "tpu", "v5e:2x2", 16e9, 819e9, {"bf16": 197e12, "int8": 394e12}, 1.5e9
    ),
    "tpu-v6e": Device(
        "TPU v6e", "tpu", "v6e:2x2", 32e9, 1640e9, {"bf16": 918e12, "int8": 1836e12}, 1.75e9
    ),
    "tpu-v5p": Device(
        "TPU v5p", "tpu", "v5p:2x2x1", 95e9, 2765e9, {"bf16": 459e12, "int8": 918e12}, 1.75e9
    ),
    "h100": Device(
        "H100 SXM 80GB", "gpu", "1x1x1", 80e9, 3352e9, {"bf16": 989e12, "int8": 1979e12}
    ),
}
