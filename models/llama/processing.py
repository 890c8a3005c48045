"""Goldens and measurements of language models as batches."""

from __future__ import annotations

import numpy as np
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.text import collate, text_prompt


def reference_prompts(inputs: dict[str, np.ndarray]) -> list[Prompt]:
    """The rows of a golden's inputs as prompts."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [text_prompt(ids[mask == 1].tolist()) for ids, mask in rows]


def reference_batch(config: LlamaConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs as one batch of the same padded length."""
    return collate(reference_prompts(inputs), pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: LlamaConfig, text_tokens: int, side: int) -> Prompt:
    """Arbitrary tokens, for measurements; the picture that ``side`` asks for is left out."""
    vocab = config.language.vocab_size
    return text_prompt(np.random.default_rng(0).integers(0, vocab, text_tokens).tolist())
