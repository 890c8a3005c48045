"""The loss of a text, window by window."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.api import Model
from mquant_jax.errors import UserError
from mquant_jax.eval import hosts
from mquant_jax.eval.answers import Answer, Answers
from mquant_jax.eval.question import Question
from mquant_jax.eval.runner import Progress, silent
from mquant_jax.models.base import VLM, Batch, Prompt
from mquant_jax.samples import Sample

LENGTH = 512  # tokens of a window


def windows_of(
    model: Model, text: str, limit: int | None = None
) -> list[tuple[Question, list[int]]]:
    """The text as windows of 512 tokens, or of the model's context where that is less.

    Windows do not overlap; a rest of one token, which predicts nothing, is left out. No special
    tokens are added.

    Args:
        limit: the first so many windows.

    Returns:
        Each window as a question without an answer, and its token ids.

    Raises:
        UserError: fewer than two tokens.
    """
    ids = model.processor.encode(text)
    length = min(LENGTH, model.max_positions - 1)
    cuts = [ids[s : s + length] for s in range(0, len(ids), length)]
    cuts = [cut for cut in cuts if len(cut) > 1][:limit]
    if not cuts:
        raise UserError(f"the text has {len(ids)} tokens; perplexity needs two at least")
    return [
        (Question(str(i), Sample((), model.processor.decode(cut)), group=str(i)), cut)
        for i, cut in enumerate(cuts)
    ]


def score_text(
    model: Model,
    text: str,
    limit: int | None = None,
    answers: Answers | None = None,
    progress: Progress = silent,
) -> tuple[list[Question], list[Answer]]:
    """The loss of every window's tokens after its first, in nats.

    Raises:
        UserError: see :func:`windows_of`.
    """
    answers = Answers() if answers is None else answers
    windows = windows_of(model, text, limit)
    losses = jax.jit(_losses)
    own = [window for i, window in enumerate(windows) if hosts.has(i)]
    for window, ids in progress(own, "score text"):
        if window.id not in answers.found:
            answers.add([(window.id, _score(model, ids, losses))])
    answers.merge()
    return [window for window, _ in windows], [answers.found[w.id] for w, _ in windows]


def _score(model: Model, ids: list[int], losses: Callable[[VLM, Batch], jax.Array]) -> Answer:
    prompt = Prompt(ids, [], np.zeros((0, 0), np.float32))
    batch = jax.tree.map(jnp.asarray, model.collate([prompt]))
    nats = float(np.asarray(losses(model.module, batch), np.float64).sum())
    return Answer("", len(ids) - 1, nats)


def _losses(module: VLM, batch: Batch) -> jax.Array:
    """float32 ``[T - 1]``: the loss of each token given those before it; 0 for padding."""
    log_probs = jax.nn.log_softmax(module(batch)[0].astype(jnp.float32))
    nats = -jnp.take_along_axis(log_probs[:-1], batch.input_ids[0, 1:, None], axis=1)[:, 0]
    return jnp.where(batch.token_class[0, :-1] >= 0, nats, 0.0)
