"""Fuse norms and rotations into the weights: the function is unchanged, and outliers spread.

Row convention (``y = x W^T + b``): a stream carries ``h R`` instead of ``h``. Writers become
``R^T W`` and readers ``W R``; an RMSNorm without weight commutes with an orthogonal ``R``. A
LayerNorm becomes an RMSNorm if no writer leaves a mean in the stream (paper section 3.2). Where a
stream must keep its mean, the LayerNorm removes it along its rotated direction. Tensors are lazy:
everything here is computed when a tensor is read, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from mquant_jax.hadamard import Orthogonal, Rotation, hadamard, plan_rotation, stream_rotation
from mquant_jax.lazy import Lazy, lazy
from mquant_jax.models.streams import Gain, Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.sections import numbered

Params = dict[str, Lazy]
Change = Callable[[np.ndarray], np.ndarray]
_TOGETHER = 1 << 22  # values rotated at a time


def rotate_params(
    params: Mapping[str, Any],
    streams: Streams,
    seed: int,
    online_signs: bool = True,
    orthogonal: bool = False,
    online_reads: bool = True,
) -> Params:
    """Fuse the norms and rotate every stream, attention and MLP that a family declares.

    Args:
        params: float tensors by name, layers separate; the head is untied. Not modified.
        seed: seed of all rotations' signs.
        online_signs: whether the online rotations have signs.
        orthogonal: rotate streams and heads by random orthogonal matrices instead of Hadamards.
        online_reads: rotate reads of unrotated streams online.

    Returns:
        New tensors, float32 where they changed: those of the model built with ``recipe.rotate``.
    """
    out = lazy(params)
    for stream in streams.streams:
        for gain in stream.gains:
            _absorb(out, gain)
        for read in stream.reads:
            for norm in norms_of(read, out):
                _fuse(out, norm, read)
        if stream.centred:
            _centre(out, stream)
        rotation = stream_rotation(stream.width, seed, stream.name, orthogonal)
        _rotate_stream(out, stream, rotation)
    for attention in streams.attentions:
        rotation = stream_rotation(attention.head_dim, seed, attention.value, orthogonal)
        _rotate_heads(out, attention, rotation)
    for hidden in (h for h in streams.hiddens if online_reads or not h.reads_stream):
        _rotate_hidden(out, hidden, seed if online_signs else None)
    return out


def in_float32(change: Change) -> Change:
    """Return tensors of any type as lazy float32 tensors."""
    return lambda x: change(np.asarray(x, np.float32)).astype(np.float32, copy=False)


def changed(tensor: Lazy, change: Change) -> Lazy:
    """Return a tensor with ``change`` (on float32) applied to all of it."""
    return tensor.then(in_float32(change), _like(tensor, tensor.shape))


def changed_rows(tensor: Lazy, change: Change, shape: tuple[int, ...] | None = None) -> Lazy:
    """Like :func:`changed`, where ``change`` acts on each row alone; ``shape`` is the new one."""
    return tensor.by_row(in_float32(change), _like(tensor, shape or tensor.shape))


def _like(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape, np.dtype(np.float32), tensor.read)


def times(x: np.ndarray, rotation: Rotation | Orthogonal) -> np.ndarray:
    """Return ``x R`` for float ``x [..., k * inputs]``, in its type: each run of ``inputs`` columns
    is rotated separately, a few thousand at a time."""
    if isinstance(rotation, Orthogonal):
        return (x.reshape(-1, rotation.n) @ rotation.matrix.astype(x.dtype)).reshape(x.shape)
    lead, x = x.shape[:-1], x.reshape(-1, rotation.inputs)
    out = np.empty((len(x), rotation.n), x.dtype)
    rows = max(1, _TOGETHER // rotation.n)
    for start in range(0, len(x), rows):
        out[start : start + rows] = _times(x[start : start + rows], rotation)
    return out.reshape(*lead, -1)


def _times(x: np.ndarray, r: Rotation) -> np.ndarray:
    outer, inner = _factors(r, x.dtype)
    x = np.pad(x * r.signs.astype(x.dtype), ((0, 0), (0, r.padding)))
    x = x.reshape(-1, r.outer, r.inner) @ inner
    return (outer @ x).reshape(-1, r.n)


@functools.lru_cache(maxsize=16)
def _factors(r: Rotation, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the Kronecker factors: the outer one transposed, the inner one normalised."""
    inner = hadamard(r.inner) * (r.outer * r.inner) ** -0.5
    return hadamard(r.outer).T.astype(dtype), inner.astype(dtype)


def expand(pattern: str, params: Mapping[str, Any]) -> Iterator[str]:
    """Return the paths that a pattern stands for: ``*`` is every layer number."""
    if "*" not in pattern:
        yield pattern
        return
    i = 0
    while any(name.startswith(pattern.replace("*", str(i)) + "/") for name in params):
        yield pattern.replace("*", str(i))
        i += 1


def norms_of(read: Read, params: Mapping[str, Any]) -> Iterator[str]:
    """Return the norms that a read stands for; none if the stream is read directly."""
    return expand(read.norm, params) if read.norm is not None else iter(())


def readers_of(read: Read, norm: str) -> Iterator[str]:
    """Return the readers of one norm: those of its own layer."""
    for reader in read.readers:
        yield numbered(reader, norm)


def _absorb(p: Params, gain: Gain) -> None:
    """Fold a layer scale into the layer that writes."""
    for writer in expand(gain.writer, p):
        vector = np.asarray(p.pop(numbered(gain.vector, writer)).load(), np.float32)
        p[f"{writer}/kernel"] = changed(
            p[f"{writer}/kernel"], partial(np.multiply, vector[:, None])
        )
        if f"{writer}/bias" in p:
            p[f"{writer}/bias"] = changed(p[f"{writer}/bias"], partial(np.multiply, vector))


def _fuse(p: Params, norm: str, read: Read) -> None:
    """Fold a norm's weight and bias into its readers; the norm's weight becomes one.

    A reader without a bias gets one if the norm has one.
    """
    gain = np.asarray(p[f"{norm}/weight"].load(), np.float32)
    shift = p.pop(f"{norm}/bias", None)  # no bias in an RMSNorm
    for reader in readers_of(read, norm):
        kernel = p[f"{reader}/kernel"]
        times_each = kernel.shape[1] // len(gain)  # 1 where the norm spans the blocks
        if shift is not None:
            moved = np.tile(shift.load().astype(np.float32), times_each)
            p[f"{reader}/bias"] = shifted(p.get(f"{reader}/bias"), kernel, moved)
        gains = np.tile(gain, times_each)
        p[f"{reader}/kernel"] = changed_rows(kernel, partial(np.multiply, gains))
    p[f"{norm}/weight"] = Lazy.of(np.ones(len(gain), np.float32))


def shifted(bias: Lazy | None, kernel: Lazy, shift: np.ndarray) -> Lazy:
    """Return what a reader must add when ``shift`` is no longer in its inputs."""

    def read(start: int | None, stop: int | None) -> np.ndarray:
        base = 0.0 if bias is None else np.asarray(bias.load(), np.float32)
        moved = base + np.asarray(kernel.load(), np.float32) @ shift
        return moved[start:stop]

    return Lazy((kernel.shape[0],), np.dtype(np.float32), read)


def _centre(p: Params, stream: Stream) -> None:
    """Remove the mean over channels from everything that is written to the stream."""
    for table in stream.tables:
        p[table] = changed_rows(p[table], lambda x: x - mean(x, 1))
    for pattern in stream.writers:
        for writer in expand(pattern, p):
            p[f"{writer}/kernel"] = changed(p[f"{writer}/kernel"], lambda w: w - mean(w, 0))
            if f"{writer}/bias" in p:
                p[f"{writer}/bias"] = changed(p[f"{writer}/bias"], lambda b: b - mean(b, 0))


def mean(x: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over an axis, which is kept; summed in float64."""
    return x.mean(axis=axis, keepdims=True, dtype=np.float64).astype(np.float32)


def _rotate_stream(p: Params, stream: Stream, rotation: Rotation | Orthogonal) -> None:
    for table in stream.tables:
        p[table] = changed_rows(p[table], lambda x: times(x, rotation))
    for pattern in stream.writers:
        for writer in expand(pattern, p):
            _rotate_outputs(p, writer, rotation)
    for read in stream.reads:
        for pattern in read.readers:
            for reader in expand(pattern, p):
                _rotate_inputs(p, reader, rotation)
        for norm in norms_of(read, p) if read.centres else ():
            # The direction of the mean in the rotated stream.
            width = p[f"{norm}/weight"].shape[0]  # that of all blocks, if it spans them
            even = np.full(width, width**-0.5)
            p[f"{norm}/weight"] = Lazy.of(times(even, rotation).astype(np.float32))


def _rotate_outputs(p: Params, layer: str, rotation: Rotation | Orthogonal) -> None:
    """Rotate the outputs of a dense layer."""
    p[f"{layer}/kernel"] = changed(p[f"{layer}/kernel"], lambda w: times(w.T, rotation).T)
    if f"{layer}/bias" in p:
        p[f"{layer}/bias"] = changed(p[f"{layer}/bias"], lambda b: times(b, rotation))


def _rotate_inputs(p: Params, layer: str, rotation: Rotation | Orthogonal) -> None:
    """Rotate the inputs of a dense layer; the rotation's padding widens it."""
    kernel = p[f"{layer}/kernel"]
    width = kernel.shape[1]
    if isinstance(rotation, Rotation):
        width = width // rotation.inputs * rotation.n
    shape = (kernel.shape[0], width)
    p[f"{layer}/kernel"] = changed_rows(kernel, lambda w: times(w, rotation), shape=shape)


def _rotate_heads(p: Params, attention: ValueOutput, rotation: Rotation | Orthogonal) -> None:
    pairs = ((v, o) for value, o in attention.pairs for v in expand(value, p))
    for value, output in pairs:
        _rotate_outputs(p, value, rotation)
        _rotate_inputs(p, numbered(output, value), rotation)


def _rotate_hidden(p: Params, hidden: Hidden, seed: int | None) -> None:
    """Fold the online rotation's inverse into the last layer and its signs into the sign
    carrier."""
    rotation = plan_rotation(hidden.width, seed, may_pad=True)
    for reader in expand(hidden.reader, p):
        _rotate_inputs(p, reader, rotation)
    if hidden.sign_carrier:
        for carrier in expand(hidden.sign_carrier, p):
            kernel, bias = f"{carrier}/kernel", f"{carrier}/bias"
            p[kernel] = changed(p[kernel], lambda w: w * rotation.signs[:, None].astype(np.float32))
            if bias in p:
                p[bias] = changed(p[bias], lambda b: b * rotation.signs)
