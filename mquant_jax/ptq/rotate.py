"""Fold norms and rotations into the weights: the function stays, outliers spread.

Row convention (``y = x W^T + b``): a stream carries ``h R`` in the place of ``h``. Writers become
``R^T W``, readers ``W R``; an RMSNorm without weight commutes with an orthogonal ``R``. A LayerNorm
becomes one when no writer leaves a mean in the stream (paper section 3.2); where a stream must keep
its mean, the LayerNorm takes it out along its rotated direction. Computed in float64 and held in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mquant_jax.hadamard import Orthogonal, Rotation, hadamard, plan_rotation, stream_rotation
from mquant_jax.models.streams import Gain, Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.nn.params import Params


def rotate_params(
    params: Params,
    streams: Streams,
    seed: int,
    online_signs: bool = True,
    orthogonal: bool = False,
    online_reads: bool = True,
) -> Params:
    """Fuse the norms and rotate every stream, attention and MLP that a family declares.

    Args:
        params: float tensors by name, layers separate; the head is untied. Left as they are.
        seed: of all rotations' signs.
        online_signs: whether the online rotations have signs.
        orthogonal: rotate streams and heads by random orthogonal matrices instead of Hadamards.
        online_reads: what is read from a stream that takes no rotation is rotated online.

    Returns:
        New tensors, float32: those of the model built with ``recipe.rotate``.
    """
    out = Tensors({name: np.asarray(value, np.float32) for name, value in params.items()})
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
    return dict(out)


class Tensors(dict):
    """Tensors held in float32, handed out in float64."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(super().__getitem__(name), np.float64)

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        super().__setitem__(name, value.astype(np.float32))


def times(x: np.ndarray, rotation: Rotation | Orthogonal) -> np.ndarray:
    """``x R`` for float64 ``x [..., k * inputs]``: each run of ``inputs`` columns on its own."""
    if isinstance(rotation, Orthogonal):
        return (x.reshape(-1, rotation.n) @ rotation.matrix).reshape(x.shape)
    lead, r = x.shape[:-1], rotation
    scale = (r.outer * r.inner) ** -0.5
    x = x.reshape(-1, r.inputs) * r.signs
    x = np.pad(x, ((0, 0), (0, r.padding)))
    x = x.reshape(-1, r.outer, r.inner) @ (hadamard(r.inner) * scale)
    return (hadamard(r.outer).T.astype(np.float64) @ x).reshape(*lead, -1)


def expand(pattern: str, params: Params) -> Iterator[str]:
    """Paths that a pattern stands for: ``*`` is every layer number."""
    if "*" not in pattern:
        yield pattern
        return
    i = 0
    while any(name.startswith(pattern.replace("*", str(i)) + "/") for name in params):
        yield pattern.replace("*", str(i))
        i += 1


def norms_of(read: Read, params: Params) -> Iterator[str]:
    """The norms that a read stands for; none where the stream is read as it is."""
    return expand(read.norm, params) if read.norm is not None else iter(())


def readers_of(read: Read, norm: str) -> Iterator[str]:
    """The readers behind one norm: those of its own layer."""
    for reader in read.readers:
        yield _beside(reader, norm)


def _beside(pattern: str, path: str) -> str:
    """``pattern`` with the layer number of ``path``."""
    number = next((part for part in path.split("/") if part.isdigit()), "*")
    return pattern.replace("*", number)


def _absorb(p: Params, gain: Gain) -> None:
    """Move a layer scale into the layer that writes."""
    for writer in expand(gain.writer, p):
        vector = np.asarray(p.pop(_beside(gain.vector, writer)), np.float64)
        p[f"{writer}/kernel"] = p[f"{writer}/kernel"] * vector[:, None]
        if f"{writer}/bias" in p:
            p[f"{writer}/bias"] = p[f"{writer}/bias"] * vector


def _fuse(p: Params, norm: str, read: Read) -> None:
    """Move a norm's weight and bias into its readers; the norm's weight becomes one.

    A reader without a bias gets one where the norm has one.
    """
    gain, shift = p[f"{norm}/weight"], p.pop(f"{norm}/bias", None)  # no bias in an RMSNorm
    for reader in readers_of(read, norm):
        kernel = p[f"{reader}/kernel"]
        times_each = kernel.shape[1] // len(gain)  # 1 where the norm spans the blocks
        if shift is not None:
            bias = p[f"{reader}/bias"] if f"{reader}/bias" in p else 0.0
            p[f"{reader}/bias"] = bias + kernel @ np.tile(shift, times_each)
        p[f"{reader}/kernel"] = kernel * np.tile(gain, times_each)
    p[f"{norm}/weight"] = np.ones_like(gain)


def _centre(p: Params, stream: Stream) -> None:
    """Take the mean over channels out of everything that is written to the stream."""
    for table in stream.tables:
        p[table] = p[table] - p[table].mean(axis=1, keepdims=True)
    for pattern in stream.writers:
        for writer in expand(pattern, p):
            kernel = p[f"{writer}/kernel"]
            p[f"{writer}/kernel"] = kernel - kernel.mean(axis=0, keepdims=True)
            if f"{writer}/bias" in p:
                p[f"{writer}/bias"] = p[f"{writer}/bias"] - p[f"{writer}/bias"].mean()


def _rotate_stream(p: Params, stream: Stream, rotation: Rotation | Orthogonal) -> None:
    for table in stream.tables:
        p[table] = times(p[table], rotation)
    for pattern in stream.writers:
        for writer in expand(pattern, p):
            p[f"{writer}/kernel"] = times(p[f"{writer}/kernel"].T, rotation).T
            if f"{writer}/bias" in p:
                p[f"{writer}/bias"] = times(p[f"{writer}/bias"], rotation)
    for read in stream.reads:
        for pattern in read.readers:
            for reader in expand(pattern, p):
                p[f"{reader}/kernel"] = times(p[f"{reader}/kernel"], rotation)
        for norm in norms_of(read, p) if read.centres else ():
            # The direction of the mean, as the rotated stream sees it.
            even = np.full(stream.width * read.blocks, (stream.width * read.blocks) ** -0.5)
            p[f"{norm}/weight"] = times(even, rotation)


def _rotate_heads(p: Params, attention: ValueOutput, rotation: Rotation | Orthogonal) -> None:
    pairs = ((v, o) for value, o in attention.pairs for v in expand(value, p))
    for value, output in pairs:
        output = _beside(output, value)
        p[f"{value}/kernel"] = times(p[f"{value}/kernel"].T, rotation).T
        if f"{value}/bias" in p:
            p[f"{value}/bias"] = times(p[f"{value}/bias"], rotation)
        p[f"{output}/kernel"] = times(p[f"{output}/kernel"], rotation)


def _rotate_hidden(p: Params, hidden: Hidden, seed: int | None) -> None:
    """The online rotation's inverse into the last layer, its signs into the sign carrier."""
    rotation = plan_rotation(hidden.width, seed, may_pad=True)
    for reader in expand(hidden.reader, p):
        p[f"{reader}/kernel"] = times(p[f"{reader}/kernel"], rotation)
    if hidden.sign_carrier:
        for carrier in expand(hidden.sign_carrier, p):
            p[f"{carrier}/kernel"] = p[f"{carrier}/kernel"] * rotation.signs[:, None]
            if f"{carrier}/bias" in p:
                p[f"{carrier}/bias"] = p[f"{carrier}/bias"] * rotation.signs
