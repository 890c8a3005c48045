"""Attention: grouped heads, softmax in float32.

Three operations. :data:`ROWS` takes what projections give, for the tokens of one call among each
other, and fuses rotary positions and quantisation; :data:`HEADS` takes heads; :data:`CACHE` is one
layer of a cache. What queries see is a :class:`~mquant_jax.ops.visibility.Visibility` in all.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mquant_jax.numerics import QTensor
from mquant_jax.ops import attention_cpu, attention_xla
from mquant_jax.ops.attention_xla import Keys, Prefix, Values
from mquant_jax.ops.registry import Form, Op, unless
from mquant_jax.ops.visibility import Visibility
from mquant_jax.shapes import Array, Float, Float32, Int32
from mquant_jax.target import Target, target

# Slots of a cache that a row attends to, where it needs no more: the least that holds its own.
REACHES = (256, 1024, 4096, 16384)
SEPARATE = "separate"  # heads are split, turned and attended to one after the other
_HALVES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Attention of ``tokens`` rows ``[heads * head_dim]`` among each other.

    Attributes:
        before, after: columns that a query may see, as in a :class:`Visibility`.
        low: queries have a lowest order that they see.
        gradient: one is taken.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    before: int | None = None
    after: int | None = None
    low: bool = False
    gradient: bool = False

    @classmethod
    def of(
        cls,
        q: Float[Array, "B T q_width"],
        k: Float[Array, "B T kv_width"],
        head_dim: int,
        seen: Visibility,
        gradient: bool = False,
    ) -> Rows:
        """For queries ``[B, T, heads * d]`` and keys ``[B, T, kv_heads * d]``."""
        heads, kv_heads = q.shape[-1] // head_dim, k.shape[-1] // head_dim
        near, low = (seen.before, seen.after), seen.low is not None
        return cls(q.shape[1], heads, kv_heads, head_dim, q.dtype, *near, low, gradient)

    @property
    def ordered(self) -> bool:
        """Tokens are in sequence order, and none sees a later one."""
        return self.after == 0


@dataclasses.dataclass(frozen=True)
class Heads:
    """Attention of queries ``[B, heads, tokens, head_dim]`` to ``keys`` keys.

    Attributes:
        int8: keys and values are.
        prefix: there are more keys and values that all rows see.
        by_row: rows differ in how many slots they use.
        elements: of the values; in a cache, of all layers.
    """

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    head_dim: int
    dtype: Any
    int8: bool
    prefix: bool
    elements: int
    by_row: bool = False

    @classmethod
    def of(
        cls,
        q: Float[Array, "B heads T d"],
        v: Float[Array, "*layers rows kv_heads S d"] | QTensor,
        prefix: Any,
        by_row: bool = False,
    ) -> Heads:
        """For a call's values, or those of a cache."""
        values = v.values if isinstance(v, QTensor) else v
        (b, heads, t, d), (kv, s) = q.shape, values.shape[-3:-1]
        narrow, more = isinstance(v, QTensor), prefix is not None
        return cls(b, heads, kv, t, s, d, q.dtype, narrow, more, values.size, by_row)


def split_heads(
    x: Float[Array, "B T width"], head_dim: int
) -> Float[Array, "B heads T {head_dim}"]:
    """Heads out of rows."""
    if target().platform == "tpu" and x.shape[1] > 1:
        # Else XLA moves the transposition up, to where the values still are float32.
        x = jax.lax.optimization_barrier(x)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, head_dim), 1, 2)


def _rows_on_tpu(q, k, v, head_dim, seen: Visibility, angles, gain, scale) -> jax.Array:
    from mquant_jax.ops import pallas_tpu_attention as kernel

    a = Rows.of(q, k, head_dim, seen)
    cut = kernel.plan(a.tokens, a.heads, a.kv_heads, a.head_dim, a.ordered)
    assert cut is not None, "other shapes are refused"
    return kernel.attend_rows(q, k, v, seen, cut, angles, gain, scale, interpret=target().interpret)


def _no_cpu_rows(a: Rows, to: Target) -> str | None:
    least = to.limits.attention_rows_cpu
    return unless(
        (to.platform == "cpu", "not a CPU"),
        (a.tokens >= least, f"{a.tokens} tokens; the least is {least}"),
    )


def _no_tpu_rows(a: Rows, to: Target) -> str | None:
    least = to.limits.attention_rows
    reason = unless(
        (to.platform == "tpu" and not to.early_tpu, "not a TPU from v5 on"),
        (a.tokens >= least, f"{a.tokens} tokens; the least is {least}"),
        (a.dtype == jnp.bfloat16, f"{a.dtype}, not bfloat16"),
        (not a.gradient, "the kernel has no gradient"),
    )
    if reason is not None:
        return reason
    from mquant_jax.ops import pallas_tpu_attention  # slow to import where there is no TPU

    shape = a.tokens, a.heads, a.kv_heads, a.head_dim, a.ordered
    return unless((pallas_tpu_attention.plan(*shape) is not None, "keys do not fit on the chip"))


def _separate(*args: Any) -> jax.Array:
    raise AssertionError("the caller splits heads where fused() is false")


ROWS: Op[Rows] = Op(
    "attention of rows",
    Form("heads_cpu", attention_cpu.attend_rows, _no_cpu_rows),
    Form("pallas_tpu", _rows_on_tpu, _no_tpu_rows),
    Form(SEPARATE, _separate),
)


def fused(spec: Rows) -> bool:
    """Whether :func:`attend_rows` takes such rows; else the caller splits heads."""
    if ROWS.choose(spec).name != SEPARATE:
        return True
    ROWS.pick(spec)  # for the record
    return False


def attend_rows(
    q: Float[Array, "B T q_width"],
    k: Float[Array, "B T kv_width"],
    v: Float[Array, "B T kv_width"],
    head_dim: int,
    seen: Visibility,
    angles: Float32[Array, "B T slots"] | None = None,
    gain: Float32[Array, "B T"] | None = None,
    scale: Float32[Array, ""] | Float32[Array, "B T 1"] | None = None,
) -> Float[Array, "B T q_width"] | QTensor:
    """Rotary positions, attention and quantisation in one.

    Args:
        q, k, v: ``[B, T, heads * d]``, as the projections give them; bfloat16 on TPU.
        seen: which tokens each sees.
        angles: by which queries and keys are turned.
        gain: factor on queries.
        scale: to quantise the result by.

    Returns:
        What rows see, in their type; with ``scale`` int8.
    """
    run = ROWS.pick(Rows.of(q, k, head_dim, seen))
    y = run(q, k, v, head_dim, seen, angles, gain, scale)
    return y if scale is None else QTensor(y, scale)


def _flash_gpu(q, k, v, seen: Visibility, prefix) -> jax.Array:
    from mquant_jax.ops import flash_gpu  # slow to import

    return flash_gpu.attend(q, k, v, seen, interpret=target().interpret)


def _heads_by_xla(q, k, v, seen: Visibility, prefix) -> jax.Array:
    b, heads, t, d = q.shape
    kv_heads = (k.values if isinstance(k, QTensor) else k).shape[1]
    q = q.reshape(b, kv_heads, heads // kv_heads, t, d)
    out = attention_xla.attend_heads(q, k, v, seen, prefix)
    return out.reshape(b, heads, t, d).swapaxes(1, 2).reshape(b, t, heads * d)


def _no_gpu(a: Heads, to: Target) -> str | None:
    most = to.limits.gpu_head
    return unless(
        (to.kernels_for_gpu, "not an NVIDIA GPU from Ampere on"),
        (not a.prefix, "the kernel has no prefix"),
        (a.dtype in _HALVES, f"{a.dtype}, not a half precision"),
        (a.head_dim <= most, f"heads of {a.head_dim} channels; the most is {most}"),
    )


def _no_flash_gpu(a: Heads, to: Target) -> str | None:
    least = to.limits.gpu_queries
    return _no_gpu(a, to) or unless(
        (a.tokens >= least, f"{a.tokens} queries; the least is {least}"),
        (not a.int8, "the kernel takes no int8"),
    )


HEADS: Op[Heads] = Op(
    "attention",
    Form("flash_gpu", _flash_gpu, _no_flash_gpu),
    Form("xla", _heads_by_xla),
)


def attend(
    q: Float[Array, "B heads T d"],
    k: Keys,
    v: Values,
    seen: Visibility,
    prefix: Prefix | None = None,
) -> Float[Array, "B T heads*d"]:
    """Scaled dot-product attention, for a few heads or queries at a time where there are many.

    Args:
        k: query heads ``g*i .. g*i+g-1`` share kv head ``i``.
        v: as ``k``, these may be int8 with a scale per key.
        seen: which keys each query sees.
        prefix: more keys and values, which every query sees.

    Returns:
        What queries see, in their type.
    """
    return HEADS.pick(Heads.of(q, v, prefix))(q, k, v, seen, prefix)


def _decode_gpu(q, cache, layer, seen: Visibility, prefix, used, rows) -> jax.Array:
    from mquant_jax.ops import decode_gpu  # slow to import

    assert rows is None, "some rows of a cache, on CPU alone"
    k, v = cache
    y = decode_gpu.attend_one(q[:, :, 0], k, v, layer, seen, interpret=target().interpret)
    return y[:, None]


def _no_decode_gpu(a: Heads, to: Target) -> str | None:
    """The kernel cuts a head's channels evenly and counts values in 32 bits."""
    return _no_gpu(a, to) or unless(
        (a.tokens == 1, f"{a.tokens} queries"),
        (a.head_dim % 16 == 0, f"heads of {a.head_dim} channels, no multiple of 16"),
        (a.elements <= to.limits.gpu_elements, "too large for 32-bit indices"),
    )


def _whole_layer(q, cache, layer, seen: Visibility, prefix, used, rows) -> jax.Array:
    k, v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
    if rows is not None:
        k, v = jax.tree.map(lambda x: x[rows], (k, v))
    return attend(q, k, v, seen, prefix)


def _row_by_row(q, cache, layer, seen: Visibility, prefix, used: jax.Array, rows) -> jax.Array:
    """:func:`attend_cache` row by row, each over no more slots than it needs, so that neither time
    nor rounding depends on the other rows."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32) if rows is None else rows
    total = seen.keys.shape[-1]
    sizes = [n for n in REACHES if n < total] + [total]

    def cut(x: jax.Array, row: jax.Array, axis: int, size: int) -> jax.Array:
        sizes = (1, 1, *x.shape[2:axis], size, *x.shape[axis + 1 :])
        return jax.lax.dynamic_slice(x, (layer, row, *[jnp.int32(0)] * 3), sizes)[0]

    def first(size: int, row: jax.Array) -> jax.Array:
        k = jax.tree.map(lambda x: cut(x, rows[row], 4, size), cache[0])
        v = jax.tree.map(lambda x: cut(x, rows[row], 3, size), cache[1])
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), (q, seen.up_to(size)))
        return attend(own[0], k, v, own[1], prefix)[0]

    def one(row: jax.Array) -> jax.Array:
        least = jnp.sum(used[row] > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
        return jax.lax.switch(least, [partial(first, n) for n in sizes], row)

    return jax.lax.map(one, jnp.arange(q.shape[0], dtype=jnp.int32))


def _no_row_by_row(a: Heads, to: Target) -> str | None:
    return unless((a.by_row and to.platform == "cpu", "not a CPU with rows of different lengths"))


CACHE: Op[Heads] = Op(
    "attention to the cache",
    Form("decode_gpu", _decode_gpu, _no_decode_gpu),
    Form("row_by_row", _row_by_row, _no_row_by_row),
    Form("whole_layer", _whole_layer),
)


def attend_cache(
    q: Float[Array, "B heads T d"],
    cache: tuple[
        Float[Array, "layers rows kv_heads d S"] | QTensor,
        Float[Array, "layers rows kv_heads S d"] | QTensor,
    ],
    layer: Int32[Array, ""],
    seen: Visibility,
    prefix: Prefix | None = None,
    used: Int32[Array, " B"] | None = None,
    rows: Int32[Array, " B"] | None = None,
) -> Float[Array, "B T heads*d"]:
    """:func:`attend` to one layer of a cache, which a kernel for single queries reads in its place.

    Args:
        cache: keys and values.
        used: how many slots may be seen, where rows differ in it.
        rows: the cache's row of each query, on CPU alone; ``None``: the same.
    """
    spec = Heads.of(q, cache[1], prefix, by_row=used is not None)
    return CACHE.pick(spec)(q, cache, layer, seen, prefix, used, rows)
