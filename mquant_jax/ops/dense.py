"""The one door to quantised matrix products: which form runs is chosen here, by platform and rows.

:func:`select_path` names the choice, so that ``inspect`` and ``bench`` can report what runs.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import cpu, xla

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)

_FORMS = {
    "int_dot": xla.int_dot,
    "byte_dot": partial(xla.int_dot, product=cpu.byte_dot),
    "vector_dot": partial(xla.int_dot, product=cpu.vector_dot),
    "halves_dot": partial(xla.int_dot, product=cpu.halves_dot),
    "padded_int_dot": xla.padded_int_dot,
    "weight_only": xla.weight_only_dot,
}


def platform() -> str:
    """The platform that programs are being traced for: ``cpu``, ``gpu`` or ``tpu``."""
    return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def target_platform(name: str) -> Iterator[None]:
    """Trace for another platform than the default one (ahead-of-time compiles)."""
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def select_path(quantised_input: bool, rows: int, w: QWeight) -> str:
    """Name of the form that :func:`quantized_dot` runs for these operands; of ``w`` only the shapes
    and bits count."""
    if not quantised_input:
        return "weight_only"
    if platform() == "cpu":
        if rows == 1 and cpu.parts_for(w) == (len(w.values) if w.storage == "parts" else 1):
            return "vector_dot"
        if rows == 1 and cpu.suits_halves_dot(w):
            return "halves_dot"
        if cpu.suits_byte_dot() and (w.groups == 1 or rows >= xla.MANY_ROWS):  # it has no batches
            return "byte_dot"
    if rows == 1 and platform() in ("cpu", "tpu"):
        return "padded_int_dot"
    return "int_dot"


def held(w: QWeight) -> QWeight:
    """A weight (or a stack of them) in the form that the platform's products want: int8 on CPU,
    where unpacking at every use costs more than the memory, in parts if rows are long; elsewhere
    int4, if it has 4 bits."""
    if platform() != "cpu":
        return w.native()
    parts = cpu.parts_for(w) or 1
    return w.in_parts(parts) if parts > 1 else w.unpacked()


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
    form = _FORMS[select_path(isinstance(x, QTensor), rows, w)]
    y = form(flat, w).reshape(*lead, w.out_features)
    return finish(y, bias, residual, dtype)


def finish(y: jax.Array, bias: jax.Array | None, residual: jax.Array | None, dtype) -> jax.Array:
    """``y + bias`` in ``dtype``, plus ``residual``."""
    y = y if bias is None else y + bias
    y = y.astype(dtype)
    return y if residual is None else residual + y
