"""Check that the ids and pictures of prompts, from a processor or the caller, fit the model.

JAX clamps indices: without a check, an id beyond the vocabulary would silently become the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Prompt, longest


def check_prompts(prompts: Sequence[Prompt], vocab: int, placeholder: int | None = None) -> None:
    """Refuse prompts with ids outside a vocabulary of ``vocab`` tokens.

    Args:
        placeholder: the placeholder of a visual token, if it is not an id.

    Raises:
        PromptError: see :func:`longest`; an id that is not an integer or outside the vocabulary.
    """
    longest(prompts)
    for i, prompt in enumerate(prompts):
        check_ids(prompt.input_ids, vocab, placeholder, f"prompt {i}")


def check_patches(prompts: Sequence[Prompt]) -> None:
    """
    Raises:
        PromptError: the number of patches differs from that of the grids. Without grids patches
            are ignored.
    """
    for i, prompt in enumerate(prompts):
        wanted = sum(math.prod(grid) for grid in prompt.grids)
        if prompt.grids and len(prompt.patches) != wanted:
            raise PromptError(f"prompt {i}: {len(prompt.patches)} patches, but its grids "
                              f"{list(prompt.grids)} have {wanted}")  # fmt: skip


def check_ids(ids: Sequence[int], vocab: int, placeholder: int | None, where: str) -> None:
    """
    Raises:
        PromptError: an id that is not an integer, or outside the vocabulary.
    """
    odd = [i for i in ids if isinstance(i, bool) or not isinstance(i, int | np.integer)]
    if not isinstance(ids, list) or odd:
        found = f"{odd[0]!r} in it" if odd else type(ids).__name__
        raise PromptError(f"{where}: token ids must be a list of integers, found {found}")
    array = np.array(ids)
    outside = (array < 0) | (array >= vocab)
    if placeholder is not None:
        outside &= array != placeholder
    if outside.any():
        at = int(np.argmax(outside))
        raise PromptError(f"{where}: token {array[at]} at position {at} is outside the model's "
                          f"vocabulary of {vocab}; the tokenizer belongs to another model, or "
                          "has tokens that were added after training")  # fmt: skip
