"""Dense products. The forms of a quantised one, best first, are :data:`DENSE`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor, QWeight
from mquant_jax.ops import cpu, gpu, xla
from mquant_jax.ops.epilogue import PLAIN, Epilogue
from mquant_jax.ops.registry import Form, Op, unless
from mquant_jax.per_layer import PerLayer
from mquant_jax.shapes import Array, Float
from mquant_jax.target import Target, target

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Product:
    """A quantised product by shapes and types.

    Attributes:
        rows, out, in_features: ``[rows, in] @ [out, in].T``.
        bits, groups, storage: of the weight.
        parts: in which its columns are stored.
        elements: stored values of the weight, or of the stack it is in.
        activations: ``int8``, ``float``, or ``simulated``: integers as float32.
    """

    rows: int
    out: int
    in_features: int
    bits: int
    groups: int
    storage: str
    parts: int
    elements: int
    activations: str = "int8"

    @classmethod
    def of(cls, rows: int, w: QWeight, activations: str = "int8") -> Product:
        """The product with one layer of ``w``."""
        parts = w.values.shape[-3] if w.storage == "parts" else 1
        shape = rows, w.out_features, w.in_features
        elements = math.prod(w.values.shape)
        return cls(*shape, w.bits, w.groups, w.storage, parts, elements, activations)


@functools.cache
def _tell_of_bf16() -> None:
    _log.warning(
        "this TPU multiplies no int8: dense layers run as W4A16, with activations widened to "
        "bfloat16 (the values are the same, the speed is not)"
    )


def _plain(form: Callable[[Any, QWeight], jax.Array]) -> Callable[..., jax.Array]:
    """Run a form of XLA's on one layer, then the epilogue."""

    def run(x: QTensor | jax.Array, w: QWeight, end: Epilogue) -> jax.Array:
        w = w.of_layer()
        if w.storage == "int4" and target().platform != "tpu":
            # XLA's CPU backend widens int4 operands to int32 and multiplies naively; its GPU
            # backend does as well, but fuses a conversion to int8 into the product.
            w = w.unpacked()
        return end(form(x, w))

    return run


def _bf16_dot(x: QTensor, w: QWeight) -> jax.Array:
    _tell_of_bf16()
    return xla.bf16_dot(x, w)


def _tpu_kernel(name: str) -> Callable[..., jax.Array]:
    def run(x: QTensor, w: QWeight, end: Epilogue) -> jax.Array:
        from mquant_jax.ops import pallas_tpu_dot  # slow to import where there is no TPU

        w = w if w.storage == "int8" else w.native()
        stack, layer = (w.values[None], jnp.int32(0)) if w.layer is None else (w.values, w.layer)
        scale, to = w.scale.reshape(-1, w.out_features), {"interpret": target().interpret}
        if name == "few_dot":
            return pallas_tpu_dot.few_dot(x, stack, layer, scale, end, **to)
        if end.gate is None:
            return pallas_tpu_dot.int4_dot(x, stack, layer, scale, end, **to)
        product = Epilogue(end.bias, dtype=end.dtype)
        y = pallas_tpu_dot.int4_dot(x, stack, layer, scale, product, **to)
        return dataclasses.replace(end, bias=None)(y)

    return run


def _accepts(activations: str) -> Callable[[Product, Target], str | None]:
    return lambda p, to: unless(
        (p.activations == activations, f"not for {p.activations} activations")
    )


def _on_early_tpu(p: Product, to: Target) -> str | None:
    return unless((to.early_tpu, "not a TPU up to v4"))


def _tpu(p: Product, to: Target, few: bool) -> str | None:
    limit = to.limits.dense_rows
    reason = unless(
        (to.platform == "tpu" and not to.early_tpu, "not a TPU from v5 on"),
        (p.groups == 1, "scales by group"),
        ((p.rows < limit) == few, f"{p.rows} rows; the limit is {limit}"),
        (few or p.bits == 4, "8-bit weights"),
    )
    if reason is not None:
        return reason
    from mquant_jax.ops import pallas_tpu_dot

    suits = pallas_tpu_dot.suits_few if few else pallas_tpu_dot.suits
    fits = suits(p.in_features, p.out)
    return unless((fits, f"{p.out} x {p.in_features} is no shape of whole tiles, or XLA is faster"))


def _vector(p: Product, to: Target) -> str | None:
    return unless(
        (p.rows == 1, f"for one row, not {p.rows}"),
        (cpu.parts_for(p.in_features, p.bits, p.groups, to) == p.parts,
         "XLA does not read such rows of weights in place"),
    )  # fmt: skip


def _halves(p: Product, to: Target) -> str | None:
    return unless(
        (p.rows == 1, f"for one row, not {p.rows}"),
        (p.bits == 8 and p.groups == 1 and p.out % 2 == 0, "not 8 bits per channel, rows even"),
        (to.reads_in_place(p.in_features), "XLA does not read such rows of weights in place"),
    )


def _bytes(p: Product, to: Target) -> str | None:
    return unless(
        (to.multiplies_bytes, "XLA uses no byte dot-product instructions for it here"),
        (p.groups == 1 or p.rows >= xla.MANY_ROWS, "has no batches, which groups need"),
    )


def _gpu(p: Product, to: Target, path: str) -> str | None:
    if reason := gpu.refuses(p.bits, p.groups, p.in_features, p.elements, to):
        return reason
    if p.storage != "packed":
        return f"weights are stored as {p.storage}"
    chosen = gpu.choose(p.rows, p.out, p.in_features).path
    return unless((chosen == path, f"the table prefers {chosen}"))


def _packed(p: Product, to: Target) -> str | None:
    packed = to.platform == "gpu" and p.storage == "packed" and p.groups == 1
    return unless((packed, "not a GPU with packed weights and a scale per channel"))


def _padded(p: Product, to: Target) -> str | None:
    return unless(
        (to.platform in ("cpu", "tpu"), "a GPU multiplies a single row"),
        (p.rows == 1, f"for one row, not {p.rows}"),
    )


_float = _accepts("float")


DENSE: Op[Product] = Op(
    "dense",
    Form("packed_weight_only", _plain(xla.packed_weight_only_dot),
         lambda p, to: _float(p, to) or _packed(p, to)),
    Form("weight_only", _plain(xla.weight_only_dot), _float),
    Form("simulated", _plain(xla.simulated_dot), _accepts("simulated")),
    Form("bf16_dot", _plain(_bf16_dot), _on_early_tpu),
    Form("pallas_tpu_few", _tpu_kernel("few_dot"), partial(_tpu, few=True)),
    Form("pallas_tpu", _tpu_kernel("int4_dot"), partial(_tpu, few=False)),
    Form("vector_dot", _plain(partial(xla.int_dot, product=cpu.vector_dot)), _vector),
    Form("halves_dot", _plain(partial(xla.int_dot, product=cpu.halves_dot)), _halves),
    Form("byte_dot", _plain(partial(xla.int_dot, product=cpu.byte_dot)), _bytes),
    Form(gpu.FEW, gpu.few, partial(_gpu, path=gpu.FEW)),
    Form(gpu.MANY, gpu.many, partial(_gpu, path=gpu.MANY)),
    Form("packed_int_dot", _plain(xla.packed_int_dot), _packed),
    Form("padded_int_dot", _plain(xla.padded_int_dot), _padded),
    Form("int_dot", _plain(xla.int_dot)),
)  # fmt: skip


def held(w: QWeight) -> QWeight:
    """A weight (or a stack of them) in the form that the target's products want: int8 on CPU, where
    unpacking at every use costs more than the memory, in parts if rows are long. Elsewhere, if it
    has 4 bits, packed for the GPU's kernels, which have no groups, else int4."""
    to = target()
    if to.platform == "cpu":
        parts = cpu.parts_for(w.in_features, w.bits, w.groups, to) or 1
        return w.in_parts(parts) if parts > 1 else w.unpacked()
    return w.packed() if to.platform == "gpu" and w.groups == 1 else w.native()


def reads_stacks(w: QWeight | PerLayer) -> bool:
    """Whether products with one layer of the stack ``w [layers, out, in]`` read it in place."""
    if isinstance(w, PerLayer) or isinstance(w.values, PerLayer):
        return True
    if w.values.ndim != 3:
        return False
    to, product = target(), Product.of(1, w)
    if w.storage == "packed":
        return gpu.refuses(w.bits, w.groups, w.in_features, w.values.size, to) is None
    return w.storage in ("int4", "int8") and _tpu(product, to, few=True) is None


def float_dot(
    x: Float[Array, "*batch in"], w: Float[Array, "out in"] | PerLayer
) -> Float[Array, "*batch out"]:
    """``x @ w.T`` in the operands' type."""
    # Rows are flattened: the gradient of a product with several leading axes is twice as slow.
    flat, to = x.reshape(-1, x.shape[-1]), target()
    on_cpu = to.platform == "cpu" and not to.reads_in_place(x.shape[-1])
    slow = to.platform == "tpu" or on_cpu
    form = xla.padded_float_dot if slow and len(flat) == 1 else xla.float_dot
    return form(flat, w).reshape(*x.shape[:-1], w.shape[0])


def quantized_dot(
    x: QTensor | Float[Array, "*batch in"], w: QWeight, end: Epilogue = PLAIN
) -> Float[Array, "*batch out"]:
    """``x @ w.T`` with the scales applied, and what ends a dense layer, in ``end.dtype``.

    Args:
        x: float for weight-only layers.
        w: one layer's weight, ``[out, in]``, in any storage.

    Raises:
        ValueError: contraction lengths differ.
    """
    values = x.values if isinstance(x, QTensor) else x
    lead, k = values.shape[:-1], values.shape[-1]
    if k != w.in_features:
        raise ValueError(f"input has {k} features, weight expects {w.in_features}")
    flat = values.reshape(-1, k)
    operand: Any = flat
    activations = "float"
    if isinstance(x, QTensor):
        activations = "simulated" if values.dtype == jnp.float32 else "int8"
        operand = QTensor(flat, x.scale if x.scale.ndim == 0 else x.scale.reshape(-1, 1))
    run = DENSE.pick(Product.of(len(flat), w, activations))
    return run(operand, w, end.flat()).reshape(*lead, w.out_features)
