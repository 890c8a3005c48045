"""Qwen-VL: token ids and pictures to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.squares import pack_vision, patchify
from mquant_jax.models.text import collate as collate_text

VISUAL = -1  # placeholder of a visual token; texts may contain any id of the vocabulary


def collate(config: QwenVLConfig, prompts: Sequence[Prompt], pad_to: int | None = None) -> Batch:
    """Left-pad prompts to one length and pack all their pictures.

    Positions, and the lengths that scale rope and attention, are those of the prompt only, so a
    row's results do not depend on the rest of the batch. (The published code counts a batch's
    padding; see :func:`reference_batch`.)

    Raises:
        PromptError: ids outside the vocabulary, or placeholders that do not match the pictures.
    """
    check_prompts(prompts, config.language.vocab_size, VISUAL)
    for i, p in enumerate(prompts):
        wanted, found = len(p.grids) * config.resampler.queries, p.input_ids.count(VISUAL)
        if wanted != found:
            raise PromptError(f"prompt {i}: {found} placeholders, but {wanted} visual tokens")
    batch = collate_text(prompts, config.image_pad_id, pad_to)
    visual = (batch.order >= 0) & (batch.input_ids == VISUAL)
    index = batch.visual_index.copy()
    index[visual] = np.arange(
        np.count_nonzero(visual)
    )  # pictures are in the order of their placeholders
    patches = [p.patches for p in prompts if p.grids]
    return dataclasses.replace(
        batch,
        input_ids=np.where(visual, config.image_pad_id, batch.input_ids).astype(np.int32),
        token_class=np.where(visual, 1, batch.token_class).astype(np.int32),
        visual_index=index,
        vision=pack_vision(np.concatenate(patches), config.side) if patches else None,
    )


def picture_ids(config: QwenVLConfig) -> list[int]:
    """Return a picture's tokens in a prompt."""
    slots = [VISUAL] * config.resampler.queries
    return [config.image_start_id, *slots, config.image_end_id]


def mark_pictures(ids: Sequence[int], config: QwenVLConfig) -> tuple[list[int], int]:
    """Replace published ids, whose slots hold a file name, by ours; also return the picture count.

    Raises:
        ValueError: start and end tokens do not pair up, or have the wrong distance.
    """
    ours = np.array(ids)
    starts = np.flatnonzero(ours == config.image_start_id)
    ends = np.flatnonzero(ours == config.image_end_id)
    slots = config.resampler.queries
    if len(starts) != len(ends) or (ends - starts != slots + 1).any():
        raise ValueError(f"pictures from {starts.tolist()} to {ends.tolist()}; expected {slots} "
                         "slots between each start and its end")  # fmt: skip
    for start in starts:
        ours[start + 1 : start + 1 + slots] = VISUAL
    return ours.tolist(), len(starts)


def reference_batch(config: QwenVLConfig, inputs: dict[str, Any]) -> Batch:
    """A golden's inputs as one batch of equal padded length.

    As in the published code, positions are columns, including padding.
    """
    pixels = inputs.get("pixel_values", np.zeros((0, 3, config.image_size, config.image_size)))
    patches = patchify(np.asarray(pixels, np.float32), config.patch_size)
    prompts, first = [], 0
    for row in inputs["input_ids"]:
        ids, count = mark_pictures(row, config)
        part = patches[first : first + count].reshape(-1, config.vision.patch_dim)
        prompts.append(Prompt(ids, [(1, config.side, config.side)] * count, part))
        first += count
    if first != len(patches):
        raise ValueError(f"{len(patches)} pictures given, placeholders for {first}")
    batch, real = collate(config, prompts), inputs["attention_mask"] == 1
    return dataclasses.replace(
        batch,
        order=np.cumsum(real, axis=1, dtype=np.int32) - 1,
        token_class=np.where(real, batch.token_class, -1).astype(np.int32),
    )


def example_prompt(config: QwenVLConfig, text_tokens: int, side: int) -> Prompt:
    """Return arbitrary tokens and one noise picture, whatever the ``side``; 0: no picture."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, config.image_start_id, text_tokens).tolist()
    if side == 0:
        return Prompt(text, [], np.zeros((0, config.vision.patch_dim), np.float32))
    patches = rng.standard_normal((config.side**2, config.vision.patch_dim), np.float32)
    half = text_tokens // 2
    ids = [*text[:half], *picture_ids(config), *text[half:]]
    return Prompt(ids, [(1, config.side, config.side)], patches)
