"""Token layouts (AIFS, section 3.2 of the paper), further turns and chunked prompts.

The decoder uses ``order`` and ``positions`` and ignores a token's column: causality is
``order[key] <= order[query]``. So the columns may be permuted. AIFS moves the visual tokens to the
front, so that each modality is one slice with one static scale and one expert's weights.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import SINK, VISUAL

Array = np.ndarray | jax.Array
LAYOUTS = ("auto", "masked", "aifs")


def uses_aifs(model: VLM, layout: str) -> bool:
    """Whether prompts are put into AIFS layout before they run.

    ``auto`` does so for models with a visual expert: each set of weights then runs on its own
    tokens only. For other models both layouts run the same products with one scale per row, so
    moving tokens gains nothing.

    Raises:
        UserError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    return layout == "aifs" or (layout == "auto" and model.language.has_experts)


def arrange(
    batch: Batch,
    visual_slots: int | None = None,
    text_slots: int | None = None,
    classes: Array | None = None,
) -> tuple[Batch, Array]:
    """The AIFS layout of a batch: ``[visual | text]``, each slice padded on its left.

    Tokens keep their order within a slice, except that sinks come first in the text slice. A
    prefill fills the cache in the same order.

    Args:
        batch: prompts in any layout. Arrays must be on the host, unless both slice lengths are
            given (then this function can be traced).
        visual_slots, text_slots: lengths of the slices; by default the smallest multiple of 16
            that holds the longest row.
        classes: int32 ``[B, T]``, token classes with sinks marked; default ``batch.token_class``.

    Returns:
        The batch, whose ``visual_slots`` is the start of the text, and int32 ``[B, T']``: the
        original column of each token, -1 for padding, for :func:`restore`.

    Raises:
        ValueError: a row has more tokens of a kind than slots (host arrays only).
    """
    np_like = np if isinstance(batch.order, np.ndarray) else jnp
    real = batch.order >= 0
    visual = real & (batch.token_class == VISUAL)
    text = real & ~visual
    n_visual, n_text = visual.sum(axis=1), text.sum(axis=1)
    if visual_slots is None:
        visual_slots = -(-int(np.max(n_visual)) // 16) * 16
    if text_slots is None:
        text_slots = -(-max(1, int(np.max(n_text))) // 16) * 16
    for name, n, slots in (("visual", n_visual, visual_slots), ("text", n_text, text_slots)):
        if isinstance(n, np.ndarray) and np.max(n) > slots:
            raise ValueError(f"{int(np.max(n))} {name} tokens in a row, but {slots} {name} slots")

    # Pad each row until both slices are full; a stable sort by slice then keeps the tokens' order.
    rows, length = batch.order.shape
    total = visual_slots + text_slots
    spare = np_like.arange(total)[None]
    before = np_like.where(spare < (visual_slots - n_visual)[:, None], 0, 2)
    unused = (spare >= (total - n_visual - n_text)[:, None]) * 9
    kind = np_like.asarray(batch.token_class if classes is None else classes)
    key = np_like.where(visual, 1, np_like.where(text, np_like.where(kind == SINK, 3, 4), 9))
    key = np_like.concatenate([np_like.maximum(before, unused), key], axis=1)
    taken = np_like.argsort(key, axis=1, stable=True)[:, :total]
    columns = np_like.where(taken < total, -1, taken - total).astype(np_like.int32)

    return dataclasses.replace(picked(batch, columns), visual_slots=visual_slots), columns


def picked(batch: Batch, columns: Array) -> Batch:
    """A batch whose tokens stood in ``columns``, int32 ``[B, T']``; -1 for padding."""
    np_like = np if isinstance(batch.order, np.ndarray) else jnp

    def pick(values: Array, fill: int) -> Array:
        moved = np_like.take_along_axis(values, np_like.maximum(columns, 0), axis=1)
        return np_like.where(columns < 0, fill, moved).astype(values.dtype)

    return dataclasses.replace(
        batch,
        input_ids=pick(batch.input_ids, 0),
        order=pick(batch.order, -1),
        positions=np_like.stack([pick(p, 0) for p in batch.positions]),
        token_class=pick(batch.token_class, -1),
        visual_index=pick(batch.visual_index, -1),
    )


def restore(values: Array, columns: Array, length: int) -> Array:
    """Undo :func:`arrange` for per-token results.

    Args:
        values: ``[B, T', ...]``, in AIFS layout.
        columns: as returned by :func:`arrange`.
        length: ``T`` of the original batch.

    Returns:
        ``[B, length, ...]``; zeros at padding.
    """
    rows = np.arange(values.shape[0])[:, None]
    out = jnp.zeros((values.shape[0], length + 1, *values.shape[2:]), values.dtype)
    # Padding (-1) goes to an extra column, which is dropped.
    return out.at[rows, jnp.asarray(columns) % (length + 1)].set(values)[:, :length]


def follow(batch: Batch, order: Array, position: Array) -> Batch:
    """Move a batch of further tokens after those already in the cache.

    Args:
        batch: the prompts of the next turn, numbered as if they started a conversation.
        order, position: int32 ``[B]`` of the next token, from a ``DecodeState``.
    """
    xp = np if isinstance(order, np.ndarray) and isinstance(batch.order, np.ndarray) else jnp
    real = batch.order >= 0
    return dataclasses.replace(
        batch,
        order=xp.where(real, batch.order + order[:, None], -1),
        positions=xp.where(real[None], batch.positions + position[None, :, None], 0),
    )


def chunks(batch: Batch, size: int) -> list[Batch]:
    """Split a long prompt into chunks of ``size`` columns, in order; pictures stay whole.

    Every chunk carries the same pictures: compute their features once (``VLM.visual``). Split
    before :func:`arrange`, because a visual token may attend to earlier text.
    """
    if batch.visual_slots is not None:
        raise ValueError("the batch is already arranged: split it into chunks first")
    starts = range(0, batch.order.shape[1], size)
    return [
        dataclasses.replace(
            batch,
            input_ids=batch.input_ids[:, i : i + size],
            order=batch.order[:, i : i + size],
            positions=batch.positions[:, :, i : i + size],
            token_class=batch.token_class[:, i : i + size],
            visual_index=batch.visual_index[:, i : i + size],
        )
        for i in starts
    ]
