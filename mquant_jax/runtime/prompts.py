"""Split a batch into groups of pictures and of prompts, each padded to a compiled size.

Runs on the host, in numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import VISUAL
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import AnyArray
from mquant_jax.runtime import buckets
from mquant_jax.runtime.buckets import PIECE
from mquant_jax.runtime.tokens import arrange, picked

Piece = tuple[int, int]  # row of the vision input, piece of its features


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The rows of a batch's vision input that go through the vision tower in one call."""

    rows: list[int]
    vision: VisionInput


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The rows of a batch that are prefilled in one call.

    Attributes:
        rows: their indices in the batch.
        batch: their tokens, without pictures; ``visual_index`` indexes the rows of ``features``.
        features: the pieces of visual features that they use.
    """

    rows: list[int]
    batch: Batch
    features: list[Piece]


def on_host(batch: Batch) -> Batch:
    """The batch as numpy arrays, int32 and float32."""

    def host(x: Any) -> np.ndarray:
        x = np.asarray(x)
        kind = {"i": np.int32, "f": np.float32}.get(x.dtype.kind)
        return x if kind is None else x.astype(kind, copy=False)

    return jax.tree.map(host, batch)


def split_pictures(tower: Any, vision: VisionInput, platform: str) -> Iterator[Pictures]:
    """Groups of pictures of equal padded size; rows without patches are skipped.

    Args:
        tower: the model's vision module.
    """
    width = vision.patches.shape[1]
    reach = np.where(vision.valid, np.arange(1, width + 1), 0).max(axis=1)

    def size(row: int) -> int:
        if not tower.takes_any_size:
            return width
        return buckets.patches(int(reach[row]), tower.patches_per_token)

    for patches, rows in _alike(np.flatnonzero(reach).tolist(), size):
        for some in _groups(rows, patches, platform):
            yield Pictures(some, jax.tree.map(lambda x: _resized(x[some], patches), vision))  # noqa: B023


def split_prompts(model: VLM, batch: Batch, aifs: bool, platform: str) -> Iterator[Prompts]:
    """Groups of prompts of equal padded size.

    A batch that is already in AIFS layout becomes one group, unchanged.

    Args:
        aifs: put each group into AIFS layout, visual tokens first.
    """
    tokens = 0
    if batch.vision is not None:
        tokens = model.vision.tokens(batch.vision.patches.shape[1])
    rows, width = batch.order.shape
    if batch.visual_slots is not None:
        yield regrouped(batch, list(range(rows)), tokens)
        return
    real = batch.order >= 0
    visual = (real & (batch.token_class == VISUAL)).sum(axis=1)
    first = np.where(real.any(axis=1), real.argmax(axis=1), width - 1)

    def size(row: int) -> tuple[int, int]:
        if not aifs:
            return 0, buckets.prompt(width - int(first[row]))
        text = int(real[row].sum() - visual[row])
        return buckets.prompt(int(visual[row])) if visual[row] else 0, buckets.prompt(text)

    for (front, back), alike in _alike(list(range(rows)), size):
        for some in _groups(alike, front + back, platform):
            part = _rows(batch, some)
            part = arrange(part, front, back)[0] if aifs else _from_first(part, first[some], back)
            yield regrouped(part, some, tokens)


def regrouped(batch: Batch, rows: list[int], tokens: int) -> Prompts:
    """A batch with ``visual_index`` renumbered to the feature pieces that it uses.

    Args:
        tokens: visual tokens per row of the vision input, which ``visual_index`` indexes so far.
    """
    index = batch.visual_index
    if not tokens or not (index >= 0).any():
        return Prompts(rows, dataclasses.replace(batch, vision=None), [])
    picture, token = np.divmod(index, tokens)
    code = picture * buckets.pieces(tokens) + token // PIECE
    found, place = np.unique(code[index >= 0], return_inverse=True)
    moved = np.full_like(index, -1)
    moved[index >= 0] = place * PIECE + token[index >= 0] % PIECE
    features = [divmod(int(c), buckets.pieces(tokens)) for c in found]
    return Prompts(rows, dataclasses.replace(batch, visual_index=moved, vision=None), features)


def _alike(rows: Sequence[int], size: Callable[[int], Hashable]) -> list[tuple[Any, list[int]]]:
    """Rows grouped by size, in order of first appearance."""
    out: dict[Any, list[int]] = {}
    for row in rows:
        out.setdefault(size(row), []).append(row)
    return list(out.items())


def _groups(rows: list[int], size: int, platform: str) -> Iterator[list[int]]:
    at = 0
    for count in buckets.groups(len(rows), size, platform):
        yield rows[at : at + count]
        at += count


def _resized(x: np.ndarray, width: int) -> np.ndarray:
    """``[N, P, ...]`` with the second axis truncated or zero-padded at its end."""
    missing = max(0, width - x.shape[1])
    return np.pad(x[:, :width], [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def _rows(batch: Batch, rows: list[int]) -> Batch:
    """The given rows of a batch, with all of its pictures."""
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[rows],
        order=batch.order[rows],
        positions=batch.positions[:, rows],
        token_class=batch.token_class[rows],
        visual_index=batch.visual_index[rows],
    )


def _from_first(batch: Batch, first: np.ndarray, width: int) -> Batch:
    """Each row from its first token's column on, padded on its right: so its tokens stand where
    they do alone or in chunks, whatever the size of the program."""
    columns = first[:, None] + np.arange(width)
    return picked(batch, np.where(columns < batch.order.shape[1], columns, -1))


def _left_padded(batch: Batch, width: int) -> Batch:
    """The last ``width`` columns of a batch, left-padded if it has fewer."""
    missing = max(0, width - batch.order.shape[1])
    return _padded(batch, lambda x: x[..., -width:], (missing, 0))


def right_padded(batch: Batch, width: int) -> Batch:
    """A batch of at most ``width`` columns, right-padded to ``width``."""
    return _padded(batch, lambda x: x, (0, width - batch.order.shape[1]))


def without_padding(batch: Batch) -> Batch:
    """A batch without the leading columns that are padding in every row."""
    first = int((np.asarray(batch.order) >= 0).any(axis=0).argmax())
    return _left_padded(batch, batch.order.shape[1] - first)


def _padded(
    batch: Batch, part: Callable[[np.ndarray], np.ndarray], missing: tuple[int, int]
) -> Batch:
    """``part`` of a batch's columns, with ``missing`` columns of padding before and after."""

    def fit(x: AnyArray, fill: int) -> np.ndarray:
        widths = [(0, 0)] * (x.ndim - 1) + [missing]
        return np.pad(part(np.asarray(x)), widths, constant_values=fill)

    return dataclasses.replace(
        batch,
        input_ids=fit(batch.input_ids, 0),
        order=fit(batch.order, -1),
        positions=fit(batch.positions, 0),
        token_class=fit(batch.token_class, -1),
        visual_index=fit(batch.visual_index, -1),
    )


def padded(model: VLM, batch: Batch) -> Batch:
    """A whole batch with prompts and pictures padded to compiled sizes, for users' own programs."""
    batch = _left_padded(on_host(batch), buckets.prompt(batch.order.shape[1]))
    if batch.vision is None:
        return batch
    tower, (count, width) = model.vision, batch.vision.patches.shape[:2]
    if not tower.takes_any_size:
        wide = width
    else:
        wide = buckets.patches(width, tower.patches_per_token)
    missing = buckets.rows(count) - count

    def fit(x: np.ndarray) -> np.ndarray:
        return np.pad(_resized(x, wide), [(0, missing), *[(0, 0)] * (x.ndim - 1)])

    picture, token = np.divmod(batch.visual_index, tower.tokens(width))
    index = np.where(batch.visual_index < 0, -1, picture * tower.tokens(wide) + token)
    vision = jax.tree.map(fit, batch.vision)
    return dataclasses.replace(batch, vision=vision, visual_index=index.astype(np.int32))
