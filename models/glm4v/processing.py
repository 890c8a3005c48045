"""GLM-4V: token ids and pictures to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.eva2 import collate as collate_eva2
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.squares import patchify

PICTURE = 3  # tokens, and positions, of a picture in a published prompt


def collate(
    config: GLM4VConfig, prompts: Sequence[Prompt], pad_id: int = 0, pad_to: int | None = None
) -> Batch:
    """Left-pad prompts to one length and pack their pictures.

    A picture takes three positions: its first vector, all its patches together, its last.

    Raises:
        PromptError: ids outside the vocabulary, placeholders that do not match the pictures, or a
            picture of another size.
    """
    batch = collate_eva2(config, prompts, pad_id, pad_to)
    if batch.vision is None:
        return batch
    place = batch.visual_index % config.tower.tokens  # within its picture
    last = config.tower.tokens - 1
    waits = (batch.visual_index >= 0) & (place > 1) & (place < last)
    positions = np.cumsum((batch.order >= 0) & ~waits, axis=1) - 1
    return dataclasses.replace(batch, positions=np.maximum(positions, 0)[None].astype(np.int32))


def expand(config: GLM4VConfig, ids: Sequence[int]) -> list[int]:
    """Replace each published begin, placeholder, end by one ``VISUAL`` per vector of the picture.

    Raises:
        ValueError: the first begin and the first end do not enclose exactly one token.
    """
    ids = list(ids)
    boi, eoi = config.boi, config.eoi
    if boi is None or eoi is None or (boi not in ids and eoi not in ids):
        return ids
    begin, end = ids.index(boi), ids.index(eoi)
    if end - begin != PICTURE - 1:
        raise ValueError(f"begin and end of the picture are {end - begin} tokens apart, not 2")
    return [*ids[:begin], *[VISUAL] * config.tower.tokens, *ids[end + 1 :]]


def reference_prompts(config: GLM4VConfig, inputs: dict[str, Any]) -> Iterator[Prompt]:
    """Return the rows of a golden's inputs as prompts, without the leading padding."""
    pictures = None
    if (pixels := inputs.get("pixel_values")) is not None:
        c = config.tower
        if pixels.shape[2:] != (c.image_size, c.image_size):
            raise ValueError(f"pictures of {pixels.shape[2:]} pixels, not of {c.image_size}")
        pictures = patchify(pixels, c.patch_size)
        if len(pictures) != len(inputs["input_ids"]):
            raise ValueError("pixel_values must have one picture per row")
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    for i, (ids, mask) in enumerate(rows):
        ids = ids[mask == 1].tolist()
        if pictures is None:
            yield Prompt(ids, [], np.zeros((0, 0), np.float32))
        else:
            side = config.tower.side
            yield Prompt(expand(config, ids), [(1, side, side)], pictures[i])


def reference_batch(config: GLM4VConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """Return a golden's inputs as one batch; its rows, padding included, grow by their pictures."""
    width = inputs["input_ids"].shape[1]
    if "pixel_values" in inputs:
        width += config.tower.tokens - PICTURE
    return collate(config, list(reference_prompts(config, inputs)), pad_to=width)


def example_prompt(config: GLM4VConfig, text_tokens: int, side: int) -> Prompt:
    """Return arbitrary tokens and one noise picture of the fixed size; side 0: no picture."""
    rng, c = np.random.default_rng(0), config.vision
    text = rng.integers(0, config.language.vocab_size, text_tokens).tolist()
    if side == 0 or c is None:
        return Prompt(text, [], np.zeros((0, 0), np.float32))
    patches = rng.standard_normal((c.side**2, c.tower.patch_dim), np.float32)
    half = text_tokens // 2
    ids = [*text[:half], *[VISUAL] * c.tokens, *text[half:]]
    return Prompt(ids, [(1, c.side, c.side)], patches)
