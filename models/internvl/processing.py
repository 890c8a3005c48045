"""InternVL: tiles and token ids to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.squares import pack_vision, patchify
from mquant_jax.models.text import collate as collate_text


def collate(
    prompts: Sequence[Prompt],
    config: InternVLConfig,
    image_token: int,
    pad_id: int = 0,
    pad_to: int | None = None,
) -> Batch:
    """Left-pad prompts to one length and pack all their tiles.

    A grid ``(t, h, w)`` of a prompt is a picture of ``t`` tiles, including the thumbnail.

    Raises:
        PromptError: ids outside the vocabulary, placeholders that do not match the tiles, or tiles
            of several sizes.
    """
    check_prompts(prompts, config.language.vocab_size)
    grids = [grid for p in prompts for grid in p.grids]
    if len({grid[1:] for grid in grids} | {(g[2], g[1]) for g in grids}) > 1:
        raise PromptError("tiles are not squares of one size")
    for i, p in enumerate(prompts):
        wanted = sum(t * h * w for t, h, w in p.grids) // config.merge**2
        found = p.input_ids.count(image_token)
        if wanted != found:
            raise PromptError(f"prompt {i}: {found} placeholders, but {wanted} visual tokens")
    batch = collate_text(prompts, pad_id, pad_to)
    if not grids:
        return batch
    visual = (batch.order >= 0) & (batch.input_ids == image_token)
    index = batch.visual_index.copy()
    index[visual] = np.arange(
        np.count_nonzero(visual)
    )  # tiles are in the order of their placeholders
    return dataclasses.replace(
        batch,
        token_class=np.where(visual, 1, batch.token_class).astype(np.int32),
        visual_index=index,
        vision=pack_vision(np.concatenate([p.patches for p in prompts if p.grids]), grids[0][1]),
    )


def placeholder(config: InternVLConfig) -> int:
    """Return the placeholder's id; any id if only the tokenizer knows it and there is none."""
    last = config.language.vocab_size - 1
    return last if config.image_token_id is None else config.image_token_id


def reference_prompts(inputs: dict[str, Any], config: InternVLConfig) -> tuple[list[Prompt], int]:
    """Return the rows of a golden's inputs as prompts, and the placeholder's id."""
    token = config.image_token_id
    if "img_context_token_id" in inputs:
        token = int(inputs["img_context_token_id"][0])
    if token is None:
        raise KeyError("img_context_token_id (missing in config.json, too)")
    patches = patchify(inputs["pixel_values"], config.patch_size)
    side = inputs["pixel_values"].shape[-1] // config.patch_size
    prompts, first = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask == 1].tolist()
        tiles = ids.count(token) // (side // config.merge) ** 2
        part = patches[first : first + tiles].reshape(-1, patches.shape[-1])
        prompts.append(Prompt(ids, [(tiles, side, side)] if tiles else [], part))
        first += tiles
    if first != len(patches):
        raise ValueError(f"{len(patches)} tiles given, placeholders for {first}")
    return prompts, token


def reference_batch(config: InternVLConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """Return a golden's inputs as one batch of the same padded length."""
    prompts, token = reference_prompts(inputs, config)
    return collate(prompts, config, token, pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: InternVLConfig, text_tokens: int, side: int) -> Prompt:
    """Return arbitrary tokens and one noise picture, for measurements.

    ``side`` pixels are rounded to a number of tiles, without a thumbnail; 0: no picture.
    """
    rng = np.random.default_rng(0)
    token = placeholder(config)
    text = rng.integers(0, token, text_tokens).tolist()
    if side == 0:
        return Prompt(text, [], np.zeros((0, config.vision.patch_dim), np.float32))
    tiles = max(1, round((side / config.tile_size) ** 2))
    edge = config.tile_size // config.patch_size
    patches = rng.standard_normal((tiles * edge * edge, config.vision.patch_dim), np.float32)
    half = text_tokens // 2
    ids = [*text[:half], *[token] * (tiles * config.tile_tokens), *text[half:]]
    return Prompt(ids, [(tiles, edge, edge)], patches)
