"""Goldens and measurements of language models as batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.text import collate, text_prompt


def batch_of(
    config: LlamaConfig, prompts: Sequence[Prompt], pad_id: int = 0, pad_to: int | None = None
) -> Batch:
    """Left-pad prompts to one length.

    Raises:
        PromptError: ids outside the vocabulary.
    """
    check_prompts(prompts, config.language.vocab_size)
    return collate(prompts, pad_id, pad_to)


def reference_prompts(inputs: dict[str, np.ndarray]) -> list[Prompt]:
    """The rows of a golden's inputs as prompts."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [text_prompt(ids[mask == 1].tolist()) for ids, mask in rows]


def reference_batch(config: LlamaConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs as one batch of equal padded length."""
    return batch_of(config, reference_prompts(inputs), pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: LlamaConfig, text_tokens: int, side: int) -> Prompt:
    """Return arbitrary tokens, for measurements; ``side`` is ignored."""
    vocab = config.language.vocab_size
    return text_prompt(np.random.default_rng(0).integers(0, vocab, text_tokens).tolist())
