"""LLaVA: turn square pictures and token ids into batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.squares import pack_vision, patchify
from mquant_jax.models.text import collate as collate_text


def collate(
    config: LlavaConfig, prompts: Sequence[Prompt], pad_id: int = 0, pad_to: int | None = None
) -> Batch:
    """Left-pad prompts to one length and pack all their pictures.

    A grid of a prompt is ``(1, side, side)``, a picture of the tower's size.

    Raises:
        PromptError: ids outside the vocabulary, placeholders that do not match the pictures, or
            pictures of another size.
    """
    check_prompts(prompts, config.language.vocab_size)
    side, token = config.vision.position_grid, config.image_token_id
    for i, p in enumerate(prompts):
        other = [grid for grid in p.grids if tuple(grid) != (1, side, side)]
        if other:
            raise PromptError(f"prompt {i}: a picture of {other[0]} patches; expected "
                              f"{(1, side, side)}, {config.image_size} pixels a side")  # fmt: skip
        wanted, found = len(p.grids) * config.image_tokens, p.input_ids.count(token)
        if wanted != found:
            raise PromptError(f"prompt {i}: {found} placeholders, but {wanted} visual tokens of "
                              f"{len(p.grids)} pictures")  # fmt: skip
    batch = collate_text(prompts, pad_id, pad_to)
    patches = [p.patches for p in prompts if p.grids]
    if not patches:
        return batch
    visual = (batch.order >= 0) & (batch.input_ids == token)
    index = batch.visual_index.copy()
    index[visual] = np.arange(
        np.count_nonzero(visual)
    )  # pictures are in the order of their prompts
    return dataclasses.replace(
        batch,
        token_class=np.where(visual, 1, batch.token_class).astype(np.int32),
        visual_index=index,
        vision=pack_vision(np.concatenate(patches), side),
    )


def reference_prompts(config: LlavaConfig, inputs: dict[str, np.ndarray]) -> list[Prompt]:
    """The rows of a golden's inputs as prompts.

    Raises:
        PromptError: pictures of another size than the tower's, or too many or few for the
            placeholders.
    """
    pixels, size = inputs["pixel_values"], config.image_size
    if pixels.shape[-2:] != (size, size):
        raise PromptError(f"pixel_values are {list(pixels.shape)}; expected pictures of "
                          f"{size} x {size} pixels")  # fmt: skip
    patches, side = patchify(pixels, config.patch_size), config.vision.position_grid
    prompts, first = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = ids[mask == 1].tolist()
        count = row.count(config.image_token_id) // config.image_tokens
        part = patches[first : first + count].reshape(-1, patches.shape[-1])
        prompts.append(Prompt(row, [(1, side, side)] * count, part))
        first += count
    if first != len(patches):
        raise PromptError(f"{len(patches)} pictures given, placeholders for {first}")
    return prompts


def reference_batch(config: LlavaConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs as one batch of equal padded length."""
    return collate(config, reference_prompts(config, inputs), pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: LlavaConfig, text_tokens: int, side: int) -> Prompt:
    """Arbitrary tokens and one noise picture, for measurements.

    Every picture has the tower's size; ``side`` 0: no picture.
    """
    rng, token = np.random.default_rng(0), config.image_token_id
    text = rng.integers(0, config.language.vocab_size, text_tokens)
    ids = np.where(text == token, (token + 1) % config.language.vocab_size, text).tolist()
    if side == 0:
        return Prompt(ids, [], np.zeros((0, config.vision.patch_dim), np.float32))
    edge, half = config.vision.position_grid, text_tokens // 2
    patches = rng.standard_normal((edge * edge, config.vision.patch_dim), np.float32)
    ids = [*ids[:half], *[token] * config.image_tokens, *ids[half:]]
    return Prompt(ids, [(1, edge, edge)], patches)
