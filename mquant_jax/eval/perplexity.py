"""The loss of a text, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mquant_jax.api import Model
from mquant_jax.errors import UserError
from mquant_jax.eval import hosts
from mquant_jax.eval.answers import Answer, Answers
from mquant_jax.eval.question import Question
from mquant_jax.eval.runner import Progress, silent
from mquant_jax.models.base import VLM, Batch, Prompt
from mquant_jax.runtime.data_parallel import AXIS
from mquant_jax.samples import Sample

LENGTH = 512  # tokens per window


def windows_of(
    model: Model, text: str, limit: int | None = None
) -> list[tuple[Question, list[int]]]:
    """Split the text into windows of 512 tokens, or of the model's context if that is shorter.

    Windows do not overlap. A last window of one token is dropped, because it predicts nothing. No
    special tokens are added.

    Args:
        limit: maximum number of windows.

    Returns:
        Each window as a question without an answer, and its token ids.

    Raises:
        UserError: the text has fewer than two tokens.
    """
    ids = model.processor.encode(text)
    length = min(LENGTH, model.max_positions - 1)
    cuts = [ids[s : s + length] for s in range(0, len(ids), length)]
    cuts = [cut for cut in cuts if len(cut) > 1][:limit]
    if not cuts:
        raise UserError(f"the text has {len(ids)} tokens; perplexity needs at least two")
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
    """The loss of each window, in nats, over all tokens but its first.

    Raises:
        UserError: see :func:`windows_of`.
    """
    answers = Answers() if answers is None else answers
    windows = windows_of(model, text, limit)
    own = [window for i, window in enumerate(windows) if hosts.has(i)]
    missing = [(w.id, ids) for w, ids in own if w.id not in answers.found]
    scorer = Scorer(model)
    for alike in progress(rounds(missing, scorer.devices), "score text"):
        nats = scorer([ids for _, ids in alike])
        found = zip(alike, nats, strict=True)
        answers.add([(key, Answer("", len(ids) - 1, loss)) for (key, ids), loss in found])
    answers.merge()
    return [window for window, _ in windows], [answers.found[w.id] for w, _ in windows]


def rounds(
    windows: Sequence[tuple[str, list[int]]], most: int
) -> list[list[tuple[str, list[int]]]]:
    """Batches of up to ``most`` consecutive windows ``(key, ids)`` of equal length."""
    out: list[list[tuple[str, list[int]]]] = []
    for window in windows:
        if not out or len(out[-1]) == most or len(out[-1][0][1]) != len(window[1]):
            out.append([])
        out[-1].append(window)
    return out


class Scorer:
    """Losses of windows of equal length, one window per device.

    A window's loss does not depend on the number of devices.

    Attributes:
        devices: number of windows that run at once.
    """

    def __init__(self, model: Model):
        self.model = model
        places = model.devices or jax.local_devices()[:1]
        self.devices = len(places)
        mesh = Mesh(np.asarray(places), (AXIS,))
        graphdef, params = nnx.split(model.module)
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        row, streams = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
        cuts: Any = Batch(row, row, streams, row, row, None)  # type: ignore[arg-type]
        self._run = jax.jit(
            jax.shard_map(
                lambda params, batch: _losses(nnx.merge(graphdef, params), batch)[None],
                mesh=mesh, in_specs=(PartitionSpec(), cuts), out_specs=row, check_vma=False,
            )
        )  # fmt: skip

    def __call__(self, windows: Sequence[list[int]]) -> list[float]:
        """The loss of each window, in nats, over all tokens but its first."""
        filled = [*windows, *[windows[-1]] * (self.devices - len(windows))]
        empty = np.zeros((0, 0), np.float32)
        batch = self.model.collate([Prompt(ids, [], empty) for ids in filled])
        found = np.asarray(self._run(self._params, batch), np.float64).sum(axis=1)
        return found[: len(windows)].tolist()


def _losses(module: VLM, batch: Batch) -> jax.Array:
    """The loss of each token of one row given the tokens before it, float32 ``[T - 1]``; 0 at
    padding."""
    log_probs = jax.nn.log_softmax(module(batch)[0].astype(jnp.float32))
    nats = -jnp.take_along_axis(log_probs[:-1], batch.input_ids[0, 1:, None], axis=1)[:, 0]
    return jnp.where(batch.token_class[0, :-1] >= 0, nats, 0.0)
