"""What programs are traced for: a device, a release of JAX, and the limits that choose kernels.

Tracing happens for the default device unless :func:`tracing_for` names another one, as
ahead-of-time compilation and tests do.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator

import jax

from mquant_jax import cpu_features

_OLDEST_GPU = 8  # major compute capability: Ampere


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes at which one implementation becomes better than another.

    Attributes:
        dense_rows: from here a TPU's product is one of many rows.
        attention_rows: fewest tokens for the TPU's attention kernel.
        attention_rows_cpu: fewest tokens for attention head by head on CPU; with fewer there is
            little to transpose.
        rotation_rows, norm_rows: fewest rows for the kernels; the fixed cost of a call outweighs
            the gain below.
        rotation_outer: largest outer factor of a rotation that fits a GPU's shared memory beside a
            row.
        gpu_queries: fewest queries for the GPU's attention kernel.
        gpu_head: most channels of a head that fit a GPU's registers.
        gpu_elements: of an array; the kernels' lowering counts them in 32 bits.
        gpu_inputs: 16 * 8 * 128 of each must add up to less than 2**31.
        short_row: XLA's CPU backend fuses what a vector is multiplied with if the float32 vector
            takes less than 16 KiB. No sum of products of int4 by int8 is then too large for
            float32 to hold exactly.
        summed: values from which on any release of XLA's CPU backend adds them up by its library.
        most_logits, part_logits: logits above which attention runs in parts, and the logits of a
            part: on CPU what its caches hold, elsewhere what memory can spare.
    """

    dense_rows: int = 128
    attention_rows: int = 128
    attention_rows_cpu: int = 64
    rotation_rows: int = 64
    norm_rows: int = 64
    rotation_outer: int = 160
    gpu_queries: int = 64
    gpu_head: int = 128
    gpu_elements: int = 2**31 - 1
    gpu_inputs: int = 2**17 - 1
    short_row: int = 16 * 1024 // 4 - 1
    summed: int = 32 * 1024
    most_logits: int = 2**28
    part_logits: int = 2**27


CPU_LIMITS = Limits(most_logits=2**22, part_logits=2**21)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device and what matters of the software that compiles for it.

    Attributes:
        platform: ``cpu``, ``gpu`` or ``tpu``.
        kind: the device as JAX names it (``TPU v5 lite``); empty if unknown.
        features: instruction-set extensions of a CPU (``avx512_vnni``).
        capability: major compute capability of an NVIDIA GPU; ``None``: another maker's.
        jax_version: of the release that compiles.
        interpret: Pallas kernels run interpreted, without their device.
        limits: see :class:`Limits`.
    """

    platform: str
    kind: str = ""
    features: frozenset[str] = frozenset()
    capability: int | None = _OLDEST_GPU
    jax_version: tuple[int, ...] = jax.__version_info__
    interpret: bool = False
    limits: Limits = Limits()

    @classmethod
    def named(cls, platform: str, kind: str = "") -> Target:
        """A target by its names. A CPU is taken to be this machine's; a GPU suits our kernels."""
        if platform != "cpu":
            return cls(platform, kind)
        return cls(platform, kind, features=cpu_features.features(), limits=CPU_LIMITS)

    @property
    def early_tpu(self) -> bool:
        """Whether it is a TPU up to v4, which has no int8 matrix unit, and too little memory on the
        chip for the kernels here."""
        return self.platform == "tpu" and bool(re.search(r"\bv[234]\b", self.kind))

    @property
    def kernels_for_gpu(self) -> bool:
        """Whether it is a GPU that our kernels run on: NVIDIA's, Ampere or later."""
        recent = self.capability is not None and self.capability >= _OLDEST_GPU
        return self.platform == "gpu" and recent

    @property
    def multiplies_bytes(self) -> bool:
        """Whether XLA's CPU backend needs uint8 by int8 to use the byte dot-product instructions.
        From jax 0.11 it uses them for int8 by int8, as tile registers (AMX) always did."""
        vnni = "avx512_vnni" in self.features and "amx_int8" not in self.features
        return self.platform == "cpu" and vnni and self.jax_version < (0, 11)

    def reads_in_place(self, in_features: int) -> bool:
        """Whether XLA's CPU backend reads the weights of a product of one float32 row, ``[out,
        in]``, without copying them first. It stopped with jax 0.11."""
        old = self.platform == "cpu" and self.jax_version < (0, 11)
        return old and in_features <= self.limits.short_row


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@functools.cache
def _here(platform: str) -> Target:
    """The default device. ``platform``: its name, so that a new default gives a new target."""
    device = jax.devices()[0]
    here = Target.named(platform, device.device_kind)
    if platform != "gpu":
        return here
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return dataclasses.replace(here, capability=int(major) if major.isdigit() else None)


def target() -> Target:
    """What programs are being traced for."""
    return _TARGET.get() or _here(jax.default_backend())


@contextlib.contextmanager
def tracing_for(target: Target | str, kind: str = "") -> Iterator[Target]:
    """Trace for another device than the default one. JAX remembers traces by function: give it a
    function of its own for each target.

    Args:
        target: a :class:`Target`, or a platform's name.
        kind: of the device, with a platform's name.
    """
    chosen = Target.named(target, kind) if isinstance(target, str) else target
    token = _TARGET.set(chosen)
    try:
        yield chosen
    finally:
        _TARGET.reset(token)
