"""Move channel scales without changing a model's function, along its declared streams.

A channel that is multiplied where it is written and divided where it is read leaves all outputs
unchanged. This works between a norm and its readers, between values and the output projection, and
between the linear half of a gated MLP and its last layer. A constant can be added to a channel and
subtracted after its reader in the same way, where writer and reader have biases and only sums that
preserve constants (such as attention's) lie between them. A constant does not pass through an
activation function or a gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from mquant_jax.models.streams import Streams
from mquant_jax.ptq.rotate import (
    Params,
    changed,
    changed_rows,
    expand,
    norms_of,
    readers_of,
    shifted,
)


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels between the tensors that write them and the layers that read them.

    Attributes:
        sources: full names of tensors whose first axis is the channel.
        readers: paths of the dense layers that read them.
        columns: int ``[K]``, the channel of each input column of the readers.
        width: number of channels.
        gated: whether they are multiplied by other channels in between.
        is_norm: whether a norm writes them.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    columns: np.ndarray
    width: int
    gated: bool = False
    is_norm: bool = False


def links(params: Mapping[str, Any], streams: Streams) -> Iterator[Link]:
    """Return all links along which channel scales may move."""

    def present(path: str, *leaves: str) -> tuple[str, ...]:
        return tuple(name for leaf in leaves if (name := f"{path}/{leaf}") in params)

    for stream in streams.streams:
        for read in stream.reads:
            for norm in norms_of(read, params):
                width = len(params[f"{norm}/weight"])  # that of all blocks, if it spans them
                columns = np.tile(np.arange(width), stream.width * read.blocks // width)
                readers = tuple(readers_of(read, norm))
                yield Link(present(norm, "weight", "bias"), readers, columns, width, is_norm=True)
    for attention in streams.attentions:
        values, outputs = (
            zip(*(expand(path, params) for path in paths), strict=True)
            for paths in zip(*attention.pairs, strict=True)
        )
        for written, heard in zip(values, outputs, strict=True):  # of one layer, each expert's
            width = len(params[f"{written[0]}/kernel"])
            heads = np.arange(width).reshape(-1, attention.head_dim)
            shared = params[f"{heard[0]}/kernel"].shape[1] // width
            columns = np.repeat(heads, shared, axis=0).ravel()
            sources = tuple(name for value in written for name in present(value, "kernel", "bias"))
            yield Link(sources, heard, columns, width)
    for hidden in streams.hiddens:
        if not hidden.sign_carrier:
            continue
        carriers = expand(hidden.sign_carrier, params)
        for carrier, reader in zip(carriers, expand(hidden.reader, params), strict=True):
            columns = np.arange(hidden.width)
            yield Link(present(carrier, "kernel", "bias"), (reader,), columns, hidden.width, True)


def scale(params: Params, link: Link, gains: np.ndarray) -> None:
    """Multiply the channels by ``gains`` (float64 ``[width]``), and divide where they are read."""
    for name in link.sources:
        column = gains.reshape(-1, *[1] * (params[name].ndim - 1)).astype(np.float32)
        params[name] = changed(params[name], partial(np.multiply, column))
    columns = gains[link.columns].astype(np.float32)
    for reader in link.readers:
        name = f"{reader}/kernel"
        params[name] = changed_rows(params[name], lambda w: w / columns)


def can_shift(params: Params, link: Link) -> bool:
    """Return whether :func:`shift` applies: sources and readers have biases, with no gate
    between."""
    biased = any(name.endswith("/bias") for name in link.sources)
    return biased and not link.gated and all(f"{r}/bias" in params for r in link.readers)


def shift(params: Params, link: Link, offsets: np.ndarray) -> None:
    """Add ``offsets`` (float64 ``[width]``) to the channels; subtract them after the readers."""
    for name in link.sources:
        if name.endswith("/bias"):
            params[name] = changed(params[name], lambda b: b + offsets.astype(np.float32))
    for reader in link.readers:
        kernel, bias = params[f"{reader}/kernel"], f"{reader}/bias"
        params[bias] = shifted(params[bias], kernel, -offsets[link.columns].astype(np.float32))
