"""Quantised matrix products; chooses the implementation by platform and number of rows.

:func:`select_path` names the choice, so that ``inspect`` and ``bench`` can report what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import cpu, gpu, xla
from mquant_jax.ops.xla import finish

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)

_KIND: contextvars.ContextVar[str | None] = contextvars.ContextVar("kind", default=None)
_log = logging.getLogger(__name__)

_Form = Callable[[Any, QWeight], jax.Array]  # of a QTensor or of floats, as its name says
_FORMS: dict[str, _Form] = {
    "int_dot": xla.int_dot,
    "byte_dot": partial(xla.int_dot, product=cpu.byte_dot),
    "vector_dot": partial(xla.int_dot, product=cpu.vector_dot),
    "halves_dot": partial(xla.int_dot, product=cpu.halves_dot),
    "padded_int_dot": xla.padded_int_dot,
    "weight_only": xla.weight_only_dot,
    "simulated": xla.simulated_dot,
    "bf16_dot": xla.bf16_dot,
}
# On GPU, where 4 bits stay packed.
_PACKED_FORMS: dict[str, _Form] = {
    "int_dot": xla.packed_int_dot,
    "weight_only": xla.packed_weight_only_dot,
}

FEWEST_ROWS = 128  # that a kernel is for


def platform() -> str:
    """The platform that programs are being traced for: ``cpu``, ``gpu`` or ``tpu``."""
    return _PLATFORM.get() or jax.default_backend()


def device_kind() -> str:
    """The kind of device that programs are being traced for, as JAX names it (``TPU v5 lite``);
    empty where tracing for another platform than the default one without a given kind."""
    if _PLATFORM.get() is not None:
        return _KIND.get() or ""
    return jax.devices()[0].device_kind


@contextlib.contextmanager
def target_platform(name: str, kind: str | None = None) -> Iterator[None]:
    """Trace for another platform than the default one (ahead-of-time compiles); see
    :func:`device_kind`."""
    tokens = _PLATFORM.set(name), _KIND.set(kind)
    try:
        yield
    finally:
        _PLATFORM.reset(tokens[0])
        _KIND.reset(tokens[1])


def early_tpu() -> bool:
    """Whether traced for a TPU up to v4: it has no int8 matrix unit, and too little memory on the
    chip for the kernels here."""
    return platform() == "tpu" and bool(re.search(r"\bv[234]\b", device_kind()))


@functools.cache
def _tell_of_bf16() -> None:
    _log.warning(
        "this TPU multiplies no int8: dense layers run as W4A16, with activations widened to "
        "bfloat16 (the values are the same, the speed is not)"
    )


def select_path(quantised_input: bool, rows: int, w: QWeight) -> str:
    """Name of the form that :func:`quantized_dot` runs for these operands; of ``w`` only the shapes
    and bits count."""
    if not quantised_input:
        return "weight_only"
    if early_tpu():
        return "bf16_dot"
    if (kernel := _tpu_kernel(rows, w)) is not None:
        return kernel
    if platform() == "cpu":
        if rows == 1 and cpu.parts_for(w) == (len(w.values) if w.storage == "parts" else 1):
            return "vector_dot"
        if rows == 1 and cpu.suits_halves_dot(w):
            return "halves_dot"
        if cpu.suits_byte_dot() and (w.groups == 1 or rows >= xla.MANY_ROWS):  # it has no batches
            return "byte_dot"
    if platform() == "gpu" and gpu.suits(w):
        return gpu.choose(rows, w.out_features, w.in_features).path
    if rows == 1 and platform() in ("cpu", "tpu"):
        return "padded_int_dot"
    return "int_dot"


def _tpu_kernel(rows: int, w: QWeight) -> str | None:
    """The path of the TPU kernel that takes a product, if one does."""
    few = rows < FEWEST_ROWS
    if platform() != "tpu" or early_tpu() or w.groups != 1 or not (few or w.bits == 4):
        return None
    from mquant_jax.ops import pallas_tpu_dot  # slow to import where there is no TPU

    suits = pallas_tpu_dot.suits_few if few else pallas_tpu_dot.suits
    path = "pallas_tpu_few" if few else "pallas_tpu"
    return path if suits(w.in_features, w.out_features) else None


def held(w: QWeight) -> QWeight:
    """A weight (or a stack of them) in the form that the platform's products want: int8 on CPU,
    where unpacking at every use costs more than the memory, in parts if rows are long. Elsewhere,
    if it has 4 bits, packed for the GPU's kernels, which have no groups, else int4."""
    if platform() == "cpu":
        parts = cpu.parts_for(w) or 1
        return w.in_parts(parts) if parts > 1 else w.unpacked()
    return w.packed() if platform() == "gpu" and w.groups == 1 else w.native()


def reads_stacks(w: QWeight) -> bool:
    """Whether products with one layer of the stack ``w [layers, out, in]`` read it in its place."""
    if w.values.ndim != 3:
        return False
    on_gpu = platform() == "gpu" and w.storage == "packed" and gpu.suits(w)
    return on_gpu or (w.storage in ("int4", "int8") and _tpu_kernel(1, w) is not None)


def float_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x @ w.T``: float ``[..., in]`` by ``[out, in]`` -> ``[..., out]`` in their type."""
    # Rows are flattened: the gradient of a product with several leading axes is twice as slow.
    flat = x.reshape(-1, x.shape[-1])
    on_cpu = platform() == "cpu" and not cpu.reads_in_place(x.shape[-1])
    slow = platform() == "tpu" or on_cpu
    form = xla.padded_float_dot if slow and len(flat) == 1 else xla.float_dot
    return form(flat, w).reshape(*x.shape[:-1], w.shape[0])


def quantized_dot(
    x: QTensor | jax.Array,
    w: QWeight,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    dtype=jnp.float32,
    gate: jax.Array | None = None,
) -> jax.Array:
    """``x @ w.T`` with the scales applied, and what ends a dense layer.

    Args:
        x: a :class:`QTensor` ``[..., in]``, or float ``[..., in]`` for weight-only layers.
        w: one layer's weight, ``[out, in]``, in any storage.
        bias: float ``[out]``, added in float32.
        residual: float ``[..., out]`` of ``dtype``, added last.
        dtype: of the result.
        gate: float ``[..., out]`` of ``dtype``, whose SiLU multiplies the result before the
            residual comes to it.

    Returns:
        ``dtype`` ``[..., out]``.

    Raises:
        ValueError: contraction lengths differ.
    """
    values = x.values if isinstance(x, QTensor) else x
    lead, k = values.shape[:-1], values.shape[-1]
    if k != w.in_features:
        raise ValueError(f"input has {k} features, weight expects {w.in_features}")
    flat = values.reshape(-1, k)
    rows = flat.shape[0]
    operand: QTensor | jax.Array = flat
    if isinstance(x, QTensor):
        operand = QTensor(flat, x.scale if x.scale.ndim == 0 else x.scale.reshape(-1, 1))
    simulated = isinstance(x, QTensor) and x.values.dtype == jnp.float32
    path = "simulated" if simulated else select_path(isinstance(x, QTensor), rows, w)
    packed = platform() == "gpu" and w.storage == "packed"
    if path in gpu.PATHS and packed and isinstance(operand, QTensor):
        residual, gate = (None if a is None else a.reshape(rows, -1) for a in (residual, gate))
        y = gpu.dense(operand, w, bias, residual, dtype, gate)
        return y.reshape(*lead, w.out_features)
    if path.startswith("pallas_tpu") and isinstance(operand, QTensor):
        y = _by_tpu_kernel(operand, w, bias, residual, dtype, gate)
        return y.reshape(*lead, w.out_features)
    if path == "bf16_dot":
        _tell_of_bf16()
    w = w.of_layer()
    if w.storage == "int4" and platform() != "tpu":
        # XLA's CPU backend widens int4 operands to int32 and multiplies naively; its GPU backend
        # does as well, but fuses a conversion to int8 into the product.
        w = w.unpacked()
    path = "int_dot" if path in gpu.PATHS else path
    form = (_PACKED_FORMS if packed and w.groups == 1 and not simulated else _FORMS)[path]
    y = form(operand, w).reshape(*lead, w.out_features)
    return finish(y, bias, residual, dtype, gate)


def _by_tpu_kernel(x: QTensor, w: QWeight, bias, residual, dtype, gate) -> jax.Array:
    from mquant_jax.ops import pallas_tpu_dot as kernels

    w = w if w.storage == "int8" else w.native()
    rows, out = len(x.values), w.out_features
    residual, gate = (None if a is None else a.reshape(rows, out) for a in (residual, gate))
    stack, layer = (w.values[None], jnp.int32(0)) if w.layer is None else (w.values, w.layer)
    operands = x.values, stack, layer, x.scale, w.scale.reshape(-1, out), bias
    if rows < FEWEST_ROWS:
        return kernels.few_dot(*operands, residual, gate, dtype)
    if gate is None:
        return kernels.int4_dot(*operands, residual, dtype)
    # Layers with a gate widen, and those are left to XLA where there are many rows.
    return finish(kernels.int4_dot(*operands, None, dtype), None, residual, dtype, gate)
