"""Symmetric integer formats: int8 activations, int4 and int8 weights, and their packing.

Everything here is a plain function on arrays or a small frozen pytree, independent of any model.

Conventions
    * A weight is stored as ``[out_features, in_features]`` with the contraction on the last axis;
      leading axes (a layer stack) come first.
    * Symmetric grid: ``q = clip(round(x / scale), -qmax - 1, qmax)``, ``qmax = 2**(bits-1) - 1``,
      ``x ~ q * scale``. Rounding is half to even. A zero channel gets scale 1 and quantises to 0.
    * int4 is packed two values per byte *by halves*: byte ``j`` of a row holds column ``j`` in its
      low nibble and column ``j + ceil(K/2)`` in its high nibble. Unpacking is then one
      concatenation without an interleave. An odd K is padded by one zero column.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.per_layer import PerLayer
from mquant_jax.shapes import Array, Float32

AnyArray = jax.Array | np.ndarray  # NumPy on the host, jax.Array inside a program
Scale = Float32[Array, ""] | Float32[Array, "*batch 1"]  # of a QTensor's values
Storage = Literal["packed", "int8", "parts", "int4"]
INT_MAX = {4: 7, 8: 127}
_ALIGNED = 64
_TINY = 1e-30  # below this, 1/scale would overflow in float32


def along_last(v: AnyArray, x: AnyArray) -> Any:
    """Add leading unit axes to ``v [K]`` or ``[J, K]`` until it has as many axes as ``x``.

    Explicit, because users may forbid JAX's implicit promotion (``jax_numpy_rank_promotion``).
    """
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised activation.

    Attributes:
        values: int8 ``[..., K]``; the same values in float32 where rounding is simulated.
        scale: float32, broadcastable to ``[..., 1]``: one number (static, one class), or one per
            token (static by token class, or dynamic).
    """

    values: jax.Array
    scale: jax.Array

    def dequantize(self) -> jax.Array:
        """Return float32 ``[..., K]``."""
        return self.values.astype(jnp.float32) * self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "layer"],
    meta_fields=["in_features", "bits", "storage"],
)
@dataclasses.dataclass(frozen=True)
class QWeight:
    """A quantised weight matrix ``[..., out, in]``.

    Attributes:
        values: ``storage == "packed"``: uint8 ``[..., out, ceil(in/2)]`` (4 bits only);
            ``storage == "int8"``: int8 ``[..., out, in]`` for 4 and for 8 bits;
            ``storage == "parts"``: int8 ``[..., parts, out, in/parts]``, the columns split into
            ``parts`` runs, each contiguous in memory (per-channel scales only);
            ``storage == "int4"``: int4 ``[..., out, in]`` (4 bits only), which accelerators store
            as two per byte and feed to their matrix units directly.
            A stack in storage ``int8`` or ``parts`` may be a :class:`PerLayer`.
        scale: float32 ``[..., out, groups]``; group ``g`` covers columns
            ``[g * in/groups, (g+1) * in/groups)``. One group means per-channel scales.
        in_features: the contraction length, without padding.
        bits: 4 or 8.
        storage: the memory format of ``values``.
        layer: int32 ``[]``: ``values`` and ``scale`` are a stack of layers, and this weight is
            the layer with this index, which kernels read in place. ``None``: no stack index.
    """

    values: jax.Array
    scale: jax.Array
    in_features: int
    bits: int
    storage: Storage
    layer: jax.Array | None = None

    @property
    def out_features(self) -> int:
        return self.values.shape[-2]

    @property
    def groups(self) -> int:
        return self.scale.shape[-1]

    def of_layer(self) -> QWeight:
        """Return the layer at index ``layer``; return the weight itself if ``layer`` is
        ``None``."""
        if self.layer is None:
            return self
        scale = jax.lax.dynamic_index_in_dim(self.scale, self.layer, keepdims=False)
        stack: Any = self.values
        if isinstance(stack, PerLayer):
            values: Any = stack.of_layer(self.layer)
        else:
            values = jax.lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)
        return dataclasses.replace(self, values=values, scale=scale, layer=None)

    def unpacked(self) -> QWeight:
        """Return the same weight with one int8 per value; return itself if it already is."""
        if self.storage == "int8":
            return self
        if self.storage == "int4":
            values = self.values.astype(jnp.int8)
        elif self.storage == "parts":
            values = self.values.swapaxes(-3, -2)
            values = values.reshape(*values.shape[:-2], self.in_features)
        else:
            values = unpack_int4(self.values, self.in_features)
        return dataclasses.replace(self, values=values, storage="int8")

    def rows(self, index: AnyArray) -> QWeight:
        """Select rows of one matrix: int ``[n]`` -> a weight ``[n, in]``."""
        values = jnp.take(self.values, index, axis=-2)
        return dataclasses.replace(self, values=values, scale=self.scale[index])

    def in_parts(self, parts: int) -> QWeight:
        """Return the same weight as ``parts`` runs of columns.

        Raises:
            ValueError: ``parts`` does not divide the columns, or the weight has groups.
        """
        if self.in_features % parts or self.groups > 1:
            raise ValueError(f"{parts} parts of {self.in_features} columns, {self.groups} group(s)")
        values = self.unpacked().values
        values = values.reshape(*values.shape[:-1], parts, -1).swapaxes(-3, -2)
        if isinstance(values, np.ndarray):
            aligned = empty_aligned(values.shape, values.dtype)
            np.copyto(aligned, values)
            values = aligned
        return dataclasses.replace(self, values=values, storage="parts")

    def packed(self) -> QWeight:
        """Return the same weight with two values per byte; 8-bit weights are returned unchanged."""
        if self.storage == "packed" or self.bits == 8:
            return self
        values = pack_int4(self.unpacked().values)
        return dataclasses.replace(self, values=values, storage="packed")

    def native(self) -> QWeight:
        """Return the same weight as an int4 array; 8-bit weights are returned unchanged."""
        if self.storage == "int4" or self.bits == 8:
            return self
        values = self.unpacked().values.astype(jnp.int4)
        return dataclasses.replace(self, values=values, storage="int4")

    def dequantize(self) -> jax.Array:
        """Return float32 ``[..., out, in]``."""
        values = self.unpacked().values.astype(jnp.float32)
        return values * expand_groups(self.scale, self.in_features)


def expand_groups(scale: jax.Array, in_features: int) -> jax.Array:
    """Repeat ``[..., groups]`` to ``[..., in_features]``; one group stays ``[..., 1]``."""
    groups = scale.shape[-1]
    if groups == 1:
        return scale
    return jnp.repeat(scale, in_features // groups, axis=-1)


def pack_int4(values):
    """Pack int8 in [-8, 7], ``[..., K]``, into uint8 ``[..., ceil(K/2)]``; NumPy in, NumPy out."""
    xp = np if isinstance(values, np.ndarray) else jnp
    k = values.shape[-1]
    half = (k + 1) // 2
    low, high = values[..., :half], values[..., half:]
    if k % 2:
        high = xp.concatenate([high, xp.zeros((*high.shape[:-1], 1), high.dtype)], axis=-1)
    low = low.astype(xp.uint8) & 0xF
    high = high.astype(xp.uint8) & 0xF
    return low | (high << 4)


def unpack_int4(packed, in_features: int, out: Any = None):
    """Unpack uint8 ``[..., ceil(K/2)]`` into int8 ``[..., K]``; NumPy in, NumPy out, written to
    ``out`` if given."""
    # Sign-extend a nibble: shift it to the top of a signed byte and back.
    if not isinstance(packed, np.ndarray):
        low = (packed << 4).astype(jnp.int8) >> 4
        high = packed.astype(jnp.int8) >> 4
        return jnp.concatenate([low, high], axis=-1)[..., :in_features]
    # This dominates the loading of a large checkpoint, so every byte is written once.
    signed, half = packed.view(np.int8), packed.shape[-1]
    out = empty_aligned((*packed.shape[:-1], in_features), np.int8) if out is None else out
    low, high = out[..., :half], out[..., half:]
    np.left_shift(signed, 4, out=low)
    np.right_shift(low, 4, out=low)
    np.right_shift(signed[..., : in_features - half], 4, out=high)
    return out


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an uninitialised NumPy array that ``jax.device_put`` can adopt on CPU without a copy,
    which requires memory aligned to 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNED, np.int8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def safe_scale(amax: jax.Array, bits: int) -> jax.Array:
    """Return the float32 scale of a symmetric grid that reaches ``amax``; 1 where ``amax`` is
    zero."""
    amax = amax.astype(jnp.float32)
    scale = amax / INT_MAX[bits]
    return jnp.where(scale > _TINY, scale, 1.0)


def round_to_grid(x: jax.Array, scale: jax.Array, bits: int = 8) -> jax.Array:
    """Return ``clip(round(x / scale))`` as int8, saturating at the ends of the ``bits``-wide
    range."""
    qmax = INT_MAX[bits]
    q = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(q, -qmax - 1, qmax).astype(jnp.int8)


def simulate_static(x: jax.Array, scale: jax.Array) -> QTensor:
    """Like :func:`quantize_static`, with the integers as float32 and gradients for both arguments.

    Products of such tensors equal those of the integers. The gradient passes straight through the
    rounding; a clipped value has none.
    """
    # Multiply by the reciprocal as quantize_static does: a quotient may round differently.
    v = jnp.clip(x.astype(jnp.float32) * (1.0 / scale), -INT_MAX[8] - 1, INT_MAX[8])
    return QTensor(v + jax.lax.stop_gradient(jnp.round(v) - v), scale)


def quantize_static(x: jax.Array, scale: jax.Array) -> QTensor:
    """Quantise to int8 with a given scale (paper section 3.1): no pass over ``x`` to find it.

    Args:
        x: float ``[..., K]``.
        scale: float32, broadcastable to ``[..., 1]``.
    """
    # The reciprocal keeps the division out of the hot elementwise loop.
    q = jnp.clip(jnp.round(x.astype(jnp.float32) * (1.0 / scale)), -128, 127)
    return QTensor(q.astype(jnp.int8), scale)


def quantize_dynamic(x: jax.Array, axis: int = -1) -> QTensor:
    """Quantise to int8 with one scale per token, computed from the token (the baseline, not the
    paper); ``axis`` is the channel axis."""
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = safe_scale(amax, 8)
    return QTensor(round_to_grid(x, scale, 8), scale)


def grouped(weight: jax.Array, group_size: int | None) -> jax.Array:
    """Reshape ``[..., out, in]`` to ``[..., out, groups, in/groups]``.

    Raises:
        ValueError: the group size does not divide the contraction length.
    """
    k = weight.shape[-1]
    size = group_size or k
    if k % size:
        raise ValueError(
            f"group_size {size} does not divide in_features {k}; "
            "choose a divisor, or null for per-channel scales"
        )
    return weight.reshape(*weight.shape[:-1], k // size, size)


def quantize_weight(
    weight: jax.Array, bits: int, group_size: int | None = None, scale: jax.Array | None = None
) -> QWeight:
    """Round a float matrix ``[..., out, in]`` to the nearest point of its symmetric grid.

    Args:
        weight: float ``[..., out, in]``.
        bits: 4 or 8.
        group_size: columns per scale; ``None`` means one scale per output channel.
        scale: float32 ``[..., out, groups]``; by default the grid reaches the largest magnitude.

    Returns:
        A :class:`QWeight` with ``storage="int8"``.
    """
    blocks = grouped(weight, group_size)
    if scale is None:
        scale = safe_scale(jnp.max(jnp.abs(blocks), axis=-1), bits)
    values = round_to_grid(blocks, scale[..., None], bits).reshape(weight.shape)
    return QWeight(values, scale.astype(jnp.float32), weight.shape[-1], bits, "int8")
