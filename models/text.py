"""Collate text-only prompts; families extend this for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.prompts import check_patches


def text_prompt(ids: Sequence[int]) -> Prompt:
    """Token ids as a prompt."""
    return Prompt(list(ids), [], np.zeros((0, 0), np.float32))


def collate(prompts: Sequence[Prompt], pad_id: int = 0, pad_to: int | None = None) -> Batch:
    """Left-pad prompts to one length. Positions are ``[1, B, T]``; every real token is text."""
    check_patches(prompts)
    lengths = np.array([len(p.input_ids) for p in prompts])
    t = max(pad_to or 0, *lengths)
    order = np.arange(t, dtype=np.int32) - (t - lengths[:, None]).astype(np.int32)
    real = order >= 0
    ids = np.full(real.shape, pad_id, np.int32)
    ids[real] = np.concatenate([p.input_ids for p in prompts])
    return Batch(
        input_ids=ids,
        order=np.where(real, order, -1),
        positions=np.where(real, order, 0)[None],
        token_class=np.where(real, 0, -1).astype(np.int32),
        visual_index=np.full_like(ids, -1),
        vision=None,
    )
