"""What goes into a model: prompts, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.nn.vit import VisionInput
from mquant_jax.numerics import AnyArray


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "order", "positions", "token_class", "visual_index", "vision"],
    meta_fields=["visual_slots"],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of prompts, padded on the left to one length ``T``.

    Attributes:
        input_ids: int32 ``[B, T]``.
        order: int32 ``[B, T]``, 0, 1, 2, ... for real tokens and -1 for padding. A masked token
            inside a prompt (also of class -1) has the order of the real token before it. It
            attends to others, but none attends to it.
        positions: int32 ``[streams, B, T]``, rotary positions.
        token_class: int32 ``[B, T]``: 0 text, 1 visual, -1 padding.
        visual_index: int32 ``[B, T]``, the row of the (flattened) visual features that replaces a
            token's embedding; -1: the token keeps its embedding.
        vision: the pictures, or ``None`` for text only.
        visual_slots: in AIFS layout (``runtime/tokens.py``), the number of leading columns that
            hold only visual tokens and padding; the others hold none. ``None``: original order.
    """

    input_ids: AnyArray
    order: AnyArray
    positions: AnyArray
    token_class: AnyArray
    visual_index: AnyArray
    vision: VisionInput | None
    visual_slots: int | None = None

    @property
    def next_position(self) -> jax.Array:
        """int32 ``[B]``: the rotary position of the first generated token."""
        return jnp.max(jnp.where(self.token_class >= 0, self.positions, -1), axis=(0, 2)) + 1

    @property
    def lengths(self) -> jax.Array:
        """int32 ``[B]``: real tokens per row."""
        return jnp.max(self.order, axis=1) + 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as model input: token ids with placeholders, and preprocessed pictures.

    Attributes:
        input_ids: token ids, with one placeholder per visual token. Families without a placeholder
            token use a number that is not an id.
        grids: ``(t, h, w)`` patches of each picture or clip, in order of appearance.
        patches: float32 ``[sum(t*h*w), patch_dim]``.
        seconds: for each picture or clip, the time between temporal patches, for families with
            time-based positions; empty: one second.
    """

    input_ids: list[int]
    grids: list[tuple[int, int, int]]
    patches: np.ndarray
    seconds: Sequence[float] = ()


def longest(prompts: Any) -> int:
    """Length of the longest prompt, in tokens.

    Raises:
        PromptError: not a sequence of prompts, an empty one, or a prompt without tokens.
    """
    if not isinstance(prompts, Sequence) or not prompts:
        raise PromptError("prompts: expected a list of at least one Prompt object")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise PromptError(f"prompt {i}: expected a Prompt, found {type(prompt).__name__}; "
                              "build it with the processor's prompt()")  # fmt: skip
        if len(prompt.input_ids) == 0:
            raise PromptError(f"prompt {i}: no tokens; expected at least one")
    return max(len(prompt.input_ids) for prompt in prompts)
