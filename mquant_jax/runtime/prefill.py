"""A prompt on its way into a row: cut into chunks, each with a key that says what it depends on.

A prompt is cut at multiples of one chunk size, whatever came before it, and each chunk runs through
a program that its place and length decide. So a chunk that is taken from an earlier request holds
the bits that running it would give: it saw the same tokens and pictures, through the same programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import VISUAL
from mquant_jax.nn.rope import DynamicScaling, SteppedScaling
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import AnyArray
from mquant_jax.runtime import buckets
from mquant_jax.runtime.prompts import (
    Piece,
    on_host,
    regrouped,
    right_padded,
    without_padding,
)
from mquant_jax.runtime.reuse import digest
from mquant_jax.runtime.tokens import chunks


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some tokens of a prompt.

    Attributes:
        start: column of the first.
        tokens: how many; only the last chunk of a prompt may have fewer than the others.
        batch: one row, padded on its right, without pictures.
        features: the pieces of visual features that it needs.
        key: of its cache entries: of all tokens and pictures up to its end.
    """

    start: int
    tokens: int
    batch: Batch
    features: list[Piece]
    key: bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole prompt.

    Attributes:
        chunks: first to last.
        vision: its pictures.
        picture_keys: for each row of ``vision``, a key of what is in it.
        columns: of the cache that it takes.
        length: order of the next token.
        position: rotary position of the next token.
        present: bool ``[vocab]``, the ids in it.
    """

    chunks: list[Chunk]
    vision: VisionInput | None
    picture_keys: list[bytes]
    columns: int
    length: int
    position: int
    present: np.ndarray


def plan(model: VLM, batch: Batch, size: int) -> Plan:
    """
    Args:
        batch: one prompt, padded on its left if at all.
        size: tokens of a chunk.
    """
    batch = without_padding(on_host(batch))
    keys = [] if batch.vision is None else list(_picture_keys(batch.vision))
    real = batch.token_class >= 0
    position = int(np.where(real, batch.positions, -1).max()) + 1
    vocab = model.language.cfg.vocab_size
    ids = batch.input_ids[real & (batch.input_ids >= 0) & (batch.input_ids < vocab)]
    present = np.bincount(ids, minlength=vocab) > 0
    made = list(_chunks(model, batch, size, keys, _root(model, position)))
    length = int(batch.order.max()) + 1
    return Plan(made, batch.vision, keys, batch.order.shape[1], length, position, present)


def _root(model: VLM, span: int) -> bytes:
    """What all chunks depend on: the length of the prompt, where rope does."""
    depends = isinstance(model.language.cfg.rope_scaling, DynamicScaling | SteppedScaling)
    return digest(str(span).encode() if depends else b"")


def _chunks(model: VLM, batch: Batch, size: int, keys: list[bytes], key: bytes) -> Iterator[Chunk]:
    row_tokens = 0 if batch.vision is None else model.vision.tokens(batch.vision.patches.shape[1])
    for i, part in enumerate(chunks(batch, size)):
        key = digest(key, *_content(part, keys, row_tokens))
        tokens = part.order.shape[1]
        padded = right_padded(part, min(size, buckets.prompt(tokens)))
        if model.language.has_experts and not (part.token_class == VISUAL).any():
            padded = dataclasses.replace(padded, visual_slots=0)
        group = regrouped(padded, [0], row_tokens)
        yield Chunk(i * size, tokens, group.batch, group.features, key)


def _content(part: Batch, keys: list[bytes], row_tokens: int) -> Iterator[bytes | AnyArray]:
    """Everything that cache entries of these tokens depend on, beside the tokens before them."""
    yield from (part.input_ids, part.order, part.positions, part.token_class)
    index = part.visual_index[part.visual_index >= 0]
    if index.size:
        row, token = np.divmod(index, row_tokens)
        yield part.visual_index >= 0
        yield token
        changes = np.flatnonzero(np.diff(row, prepend=-1))
        yield changes
        yield from (keys[row[i]] for i in changes)


def _picture_keys(vision: VisionInput) -> Iterator[bytes]:
    for row in range(len(vision.valid)):
        valid = vision.valid[row]
        rows = vision.position_rows
        yield digest(
            np.asarray(vision.patches[row][valid]), np.asarray(vision.coords[row][valid]),
            None if rows is None else np.asarray(rows[row][valid]),
        )  # fmt: skip
