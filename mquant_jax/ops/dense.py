"""The one door to quantised matrix products: which form runs is chosen here, by platform and rows.

:func:`select_path` names the choice, so that ``inspect`` and ``bench`` can report what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import cpu, xla

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)

_KIND: contextvars.ContextVar[str | None] = contextvars.ContextVar("kind", default=None)
_log = logging.getLogger(__name__)

_FORMS = {
    "int_dot": xla.int_dot,
    "byte_dot": partial(xla.int_dot, product=cpu.byte_dot),
    "vector_dot": partial(xla.int_dot, product=cpu.vector_dot),
    "padded_int_dot": xla.padded_int_dot,
    "weight_only": xla.weight_only_dot,
    "bf16_dot": xla.bf16_dot,
}

FEWEST_ROWS = 128  # that a kernel is for


def platform() -> str:
    """The platform that programs are being traced for: ``cpu``, ``gpu`` or ``tpu``."""
    return _PLATFORM.get() or jax.default_backend()


def device_kind() -> str:
    """The kind of device that programs are being traced for, as JAX names it (``TPU v5 lite``);
    empty where another platform than the default one is traced for and nobody told."""
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
    if rows >= FEWEST_ROWS and _suits_kernel(w):
        return "pallas_tpu"
    if platform() == "cpu":
        if rows == 1 and w.groups == 1 and cpu.suits_vector_dot(w.in_features, w.bits):
            return "vector_dot"
        if cpu.suits_byte_dot() and (w.groups == 1 or rows >= xla.MANY_ROWS):  # it has no batches
            return "byte_dot"
    if rows == 1 and platform() in ("cpu", "tpu"):
        return "padded_int_dot"
    return "int_dot"


def _suits_kernel(w: QWeight) -> bool:
    if platform() != "tpu" or early_tpu() or w.bits != 4 or w.groups != 1:
        return False
    from mquant_jax.ops import pallas_tpu_dot  # slow to import where there is no TPU

    return pallas_tpu_dot.suits(w.in_features, w.out_features)


def fetches_layers(w: QWeight) -> bool:
    """Whether products take a stack's weight ``[layers, out, in]`` whole, with the layer's number
    (``QWeight.layer``), and fetch the layer themselves."""
    return w.storage == "int4" and w.values.ndim == 3 and _suits_kernel(w)


def held(w: QWeight) -> QWeight:
    """A weight in the form that the platform's products want: int8 on CPU, where unpacking at
    every use costs more than the memory; elsewhere int4, if it has 4 bits."""
    return w.unpacked() if platform() == "cpu" else w.native()


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
) -> jax.Array:
    """``x @ w.T`` with the scales applied, and what ends a dense layer.

    Args:
        x: a :class:`QTensor` ``[..., in]``, or float ``[..., in]`` for weight-only layers.
        w: one layer's weight, ``[out, in]``, in any storage.
        bias: float ``[out]``, added in float32.
        residual: float ``[..., out]`` of ``dtype``, added last.
        dtype: of the result.

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
    if isinstance(x, QTensor):
        scale = x.scale if x.scale.ndim == 0 else x.scale.reshape(-1, 1)
        flat = QTensor(flat, scale)
    if w.storage == "int4" and platform() != "tpu":
        # XLA's CPU backend widens int4 operands to int32 and multiplies naively; its GPU backend
        # does as well, but fuses a conversion to int8 into the product.
        w = w.unpacked()
    path = select_path(isinstance(x, QTensor), rows, w)
    if path == "pallas_tpu":
        return _kernel(flat, w, bias, residual, dtype).reshape(*lead, w.out_features)
    w = w.alone()
    if path == "bf16_dot":
        _tell_of_bf16()
    y = _FORMS[path](flat, w).reshape(*lead, w.out_features)
    return finish(y, bias, residual, dtype)


def _kernel(x: QTensor, w: QWeight, bias, residual, dtype) -> jax.Array:
    from mquant_jax.ops import pallas_tpu_dot

    residual = None if residual is None else residual.reshape(len(x.values), w.out_features)
    w = w if w.storage == "int4" else w.native()
    stack, layer = (w.values[None], jnp.int32(0)) if w.layer is None else (w.values, w.layer)
    return pallas_tpu_dot.int4_dot(
        x.values, stack, layer, x.scale, w.scale[:, 0], bias, residual, dtype
    )


def finish(y: jax.Array, bias: jax.Array | None, residual: jax.Array | None, dtype) -> jax.Array:
    """``y + bias`` in ``dtype``, plus ``residual``."""
    y = y if bias is None else y + bias
    y = y.astype(dtype)
    return y if residual is None else residual + y
