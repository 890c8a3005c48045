"""CogVLM2: token ids and pictures to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.eva2 import collate as collate_eva2
from mquant_jax.models.squares import patchify

TEXT_TYPE, VISUAL_TYPE, PADDING = 0, 1, -1


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    """Shift each row's values one column right (``by`` 1) or left (-1), filling with text."""
    out = np.full_like(values, TEXT_TYPE)
    if by > 0:
        out[:, 1:] = values[:, :-1]
    else:
        out[:, :-1] = values[:, 1:]
    return out


def positions(types: np.ndarray) -> np.ndarray:
    """Return rotary positions as in the published code: int ``[B, T]``.

    A picture between texts takes three positions: its first vector, all its patches together, its
    last. Adjacent pictures share theirs. A token next to padding does not end a picture, and a
    row's first token after padding has position 1.

    Args:
        types: int ``[B, T]``: 0 text, 1 a picture's vector, -1 padding.
    """
    beside_text = (_shifted(types, 1) == TEXT_TYPE) | (_shifted(types, -1) == TEXT_TYPE)
    ends = (types == VISUAL_TYPE) & beside_text
    types = np.where(ends, TEXT_TYPE, types)
    first_patch = (types == VISUAL_TYPE) & (_shifted(types, 1) == TEXT_TYPE)
    steps = (types == TEXT_TYPE) | first_patch
    steps[:, 0] = False
    return np.cumsum(steps, axis=1)


def collate(config: CogVLM2Config, prompts: Sequence[Prompt], pad_to: int | None = None) -> Batch:
    """Left-pad prompts to one length and pack their pictures, each row independently.

    Raises:
        PromptError: ids outside the vocabulary, placeholders that do not match the pictures, or a
            picture of another size.
    """
    batch = collate_eva2(config, prompts, config.placeholder, pad_to)
    types = _types(batch)
    # Padding counts as text, so that a picture may come first, but takes no positions.
    places = positions(np.maximum(types, TEXT_TYPE))
    start = np.take_along_axis(places, np.argmax(types >= 0, axis=1)[:, None], axis=1)
    return _routed(batch, np.maximum(places - start, 0))


def _types(batch: Batch) -> np.ndarray:
    """Return token types ``[B, T]`` of a batch whose visual tokens are all of class 1."""
    return np.where(batch.order < 0, PADDING, batch.visual_index >= 0)


def _routed(batch: Batch, places: np.ndarray) -> Batch:
    """Return the batch with these positions; the last vector of a run goes to the language
    expert."""
    visual = np.asarray(batch.visual_index) >= 0
    followed = _shifted(visual.astype(np.int32), -1) == 1
    classes = np.where(visual & ~followed, TEXT_TYPE, batch.token_class)
    return dataclasses.replace(
        batch,
        positions=places[None].astype(np.int32),
        token_class=classes.astype(np.int32),
    )


def reference_prompts(config: CogVLM2Config, inputs: dict[str, Any]) -> Iterator[Prompt]:
    """Return the rows of a golden's inputs as prompts, without the leading padding."""
    c, ids, at = config.vision, inputs["input_ids"], 0
    patches = np.zeros((0, c.side**2, c.tower.patch_dim), np.float32)
    if (pixels := inputs.get("images")) is not None and len(pixels):
        if pixels.shape[2:] != (c.image_size, c.image_size):
            raise ValueError(f"pictures of {pixels.shape[2:]} pixels, not of {c.image_size}")
        patches = patchify(pixels, c.patch_size)
    types = inputs.get("token_type_ids", np.zeros_like(ids))
    for row, kind, mask in zip(ids, types, inputs["attention_mask"], strict=True):
        row = np.where(kind == VISUAL_TYPE, VISUAL, row)[mask == 1].tolist()
        n = row.count(VISUAL) // c.tokens
        part = patches[at : at + n]
        at += n
        yield Prompt(row, [(1, c.side, c.side)] * len(part), part.reshape(-1, patches.shape[-1]))
    if at != len(patches):
        raise ValueError(f"{len(patches)} pictures given, placeholders for {at}")


def reference_batch(config: CogVLM2Config, inputs: dict[str, np.ndarray]) -> Batch:
    """Return a golden's inputs as one batch of the same padded length."""
    width = inputs["input_ids"].shape[1]
    prompts = list(reference_prompts(config, inputs))
    batch = collate_eva2(config, prompts, config.placeholder, width)
    return _routed(batch, positions(_types(batch)))


def example_prompt(config: CogVLM2Config, text_tokens: int, side: int) -> Prompt:
    """Return arbitrary tokens and one noise picture of the fixed size; side 0: no picture."""
    rng, c = np.random.default_rng(0), config.vision
    text = rng.integers(0, config.language.vocab_size, text_tokens).tolist()
    if side == 0:
        return Prompt(text, [], np.zeros((0, 0), np.float32))
    patches = rng.standard_normal((c.side**2, c.tower.patch_dim), np.float32)
    return Prompt([text[0], *[VISUAL] * c.tokens, *text[1:]], [(1, c.side, c.side)], patches)
