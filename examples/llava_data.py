"""Training data of a small LLaVA: features of pictures, ids of questions and answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples import low_rank
from examples.llava_pictures import Picture
from mquant_jax.checkpoint.plan import plan
from mquant_jax.checkpoint.source import Reader
from mquant_jax.models.base import VLM, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.flow import run
from mquant_jax.nn.params import set_params
from mquant_jax.recipe import Recipe

LENGTH = 18  # tokens of a question with its answer and the end token
ANSWER = 5  # of them at most in the answer, with its end token


class Model:
    """The folder's tower, tokenizer and language model.

    Attributes:
        front: ids before a picture and after it.
        shape, frozen: see examples/low_rank.py.
    """

    def __init__(self, folder: Path):
        reader = Reader(folder)
        family = family_for(reader.config, folder)
        self.hf = reader.config
        self.config = family.config_from_hf(reader.config)
        self.processor = family.processor(folder, self.config)
        todo = plan(family, self.config, reader)
        ours = {k: np.asarray(v, np.float32) for k, v in todo.read(reader).items()}
        self.module: VLM = abstract_model(family, self.config, Recipe())
        set_params(self.module, ours)
        tensors = {n: reader.read(n).astype(np.float32) for n in reader.tensors}
        self.shape = low_rank.shape_of(reader.config["text_config"])
        self.frozen = low_rank.frozen_language(tensors, self.shape)
        self._sample_ids()

    def _sample_ids(self) -> None:
        """Find the ids around picture, question and answer in a whole prompt."""
        image = np.zeros((self.config.image_size,) * 2 + (3,), np.uint8)
        ids = self.processor.prompt("A", [image]).input_ids
        token, question = self.config.image_token_id, self.processor.encode("A")
        first = ids.index(token)
        last = len(ids) - ids[::-1].index(token)
        at = last + ids[last:].index(question[0])
        self.front = ids[:first], ids[last:at]
        self.between = ids[at + 1 :]
        self.end = [self.processor.stop_ids[0]]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The tower's features of some pictures, float16 ``[N, tokens, width]``."""
        prompts = [self.processor.prompt("A", [image]) for image in images]
        vision = self.processor.collate(prompts).vision
        return np.asarray(_features(self.module.vision, jax.tree.map(jnp.asarray, vision)))

    def row(self, question: str, answer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What :func:`row_of` makes of a question and its answer."""
        asked = self.processor.encode(question) + self.between
        return row_of(asked, self.processor.encode(answer) + self.end)


def row_of(
    asked: Sequence[int], answered: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return ids ``[LENGTH]``, padded with 0, the positions that predict the answer and what they
    predict ``[ANSWER]``, padded with -1; ``None`` if it does not fit."""
    if len(answered) > ANSWER or len(asked) + len(answered) > LENGTH:
        return None
    ids, at, labels = np.zeros(LENGTH, np.int32), *np.full((2, ANSWER), -1, np.int32)
    row = [*asked, *answered]
    ids[: len(row)] = row
    at[: len(answered)] = np.arange(len(asked) - 1, len(row) - 1)
    labels[: len(answered)] = answered
    return ids, at, labels


@jax.jit
def _features(tower: Any, vision: Any) -> jax.Array:
    return run(tower.features(vision)).astype(jnp.float16)


class Data:
    """Pictures as features, and their questions as ids.

    Attributes:
        features: float16 ``[N, tokens, width]``, kept in a file.
        rows: per picture, what :meth:`Model.row` makes of its questions.
        kinds: per picture.
    """

    def __init__(self, model: Model, drawn: Sequence[Picture], file: Path):
        self.kinds = [p.kind for p in drawn]
        self.rows = [[r for q in p.questions if (r := model.row(*q))] for p in drawn]
        if not file.exists():
            _store_features(model, drawn, file)
        self.features = np.load(file, mmap_mode="r", allow_pickle=False)
        if len(self.features) != len(drawn):
            raise SystemExit(f"{file}: {len(self.features)} pictures, expected {len(drawn)}; "
                             "the options have changed, delete it")  # fmt: skip

    def batch(self, which: Sequence[int], questions: int, rng: np.random.Generator | None):
        """Features and ids, positions, labels ``[B, Q, ...]`` of some pictures; without a
        generator, a picture's first questions."""
        out = []
        for i in which:
            rows = self.rows[i]
            order = rng.permutation(len(rows)) if rng else np.arange(len(rows))
            out.append([rows[j] for j in np.resize(order, questions)])
        ids, at, labels = (np.stack([[r[k] for r in rows] for rows in out]) for k in range(3))
        return self.features[np.asarray(which)].astype(np.float32), ids, at, labels


def _store_features(model: Model, drawn: Sequence[Picture], file: Path, size: int = 32) -> None:
    parts = []
    for start in range(0, len(drawn), size):
        images = [p.image for p in drawn[start : start + size]]
        padded = images + [images[-1]] * (size - len(images))  # one shape compiles once
        parts.append(model.features(padded)[: len(images)])
        print(f"\rfeatures {start + len(images)}/{len(drawn)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    np.save(file, np.concatenate(parts), allow_pickle=False)
