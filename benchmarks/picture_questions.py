"""Many short questions about each picture, answered in one forward pass per group of pictures.

What comes before a question, the picture included, is computed once per picture and put into the
key/value cache. Every question then reads its picture's part of it, as if it had been asked alone.
Answers are fed: a greedy answer is right if and only if each of its tokens, the end included, is
the likeliest one after the true tokens before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.models.base import VLM, Batch, Processor, Prompt
from mquant_jax.nn.act_quant import TEXT
from mquant_jax.nn.cache import KVCache
from mquant_jax.samples import Sample

PICTURES, QUESTIONS = 8, 64  # of a group: one shape compiles once
Collate = Callable[[Sequence[Prompt]], Batch]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question, ready to be fed.

    Attributes:
        front: the prompt up to its last visual token.
        question, answer: the ids after it, and those of the answer with its end.
        picture: number of the picture; its questions are neighbours and share the front.
    """

    front: Prompt
    question: tuple[int, ...]
    answer: tuple[int, ...]
    picture: int


def asked(samples: Sequence[Sample], processor: Processor, image_token: int) -> list[Asked]:
    """Samples with one picture each as questions; neighbours with equal pictures share one."""
    out: list[Asked] = []
    picture, last = -1, None
    for sample in samples:
        prompt = sample.prompt(processor)
        at = len(prompt.input_ids) - prompt.input_ids[::-1].index(image_token)
        same = last is not None and np.array_equal(sample.images[0], last)
        picture, last = picture + (not same), sample.images[0]
        front = out[-1].front if same else dataclasses.replace(
            prompt, input_ids=prompt.input_ids[:at]
        )  # fmt: skip
        answer = (*processor.encode(sample.answer), processor.stop_ids[0])
        out.append(Asked(front, tuple(prompt.input_ids[at:]), answer, picture))
    return out


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["fronts", "owner", "ids", "given", "positions", "labels"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Group:
    """Questions about some pictures.

    Attributes:
        fronts: the pictures' prompts, without padding: ``[P, F]``.
        owner: int32 ``[Q]``, the front of each question.
        ids: int32 ``[Q, T]``, questions with their answers but for the end; padded on the right.
        given: int32 ``[Q, T]``: 1 for tokens of the answer, 0 for the question, -1 for padding.
        positions: int32 ``[Q, A]``, the columns of ``ids`` that predict an answer's tokens.
        labels: int32 ``[Q, A]``, what they should predict; -1: nothing.
    """

    fronts: Batch
    owner: jax.Array
    ids: jax.Array
    given: jax.Array
    positions: jax.Array
    labels: jax.Array


def groups(questions: Sequence[Asked], collate: Collate) -> Iterator[Group]:
    """Pack questions, all groups of one shape; the rest of the last one is filled with rows
    without labels."""
    length = max(len(q.question) + len(q.answer) - 1 for q in questions)
    longest = max(len(q.answer) for q in questions)
    part: list[Asked] = []
    for question in [*questions, None]:
        pictures = {q.picture for q in part}
        new = question is not None and question.picture not in pictures
        if part and (
            question is None or len(part) == QUESTIONS or (new and len(pictures) == PICTURES)
        ):
            yield _group(part, length, longest, collate)
            part = []
        if question is not None:
            part.append(question)


def _group(part: list[Asked], length: int, longest: int, collate: Collate) -> Group:
    fronts = {q.picture: q.front for q in part}
    owner = np.zeros(QUESTIONS, np.int32)
    ids = np.zeros((QUESTIONS, length), np.int32)
    given = np.full((QUESTIONS, length), -1, np.int32)
    positions = np.zeros((QUESTIONS, longest), np.int32)
    labels = np.full((QUESTIONS, longest), -1, np.int32)
    for i, q in enumerate(part):
        row, n = [*q.question, *q.answer[:-1]], len(q.question)
        owner[i] = list(fronts).index(q.picture)
        ids[i, : len(row)], given[i, :n], given[i, n : len(row)] = row, 0, 1
        positions[i, : len(q.answer)] = np.arange(n - 1, len(row))
        labels[i, : len(q.answer)] = q.answer
    prompts = list(fronts.values())
    prompts += prompts[-1:] * (PICTURES - len(prompts))
    return Group(collate(prompts), owner, ids, given, positions, labels)


def answer_streams(module: VLM, group: Group) -> jax.Array:
    """The stream before the final norm where answers are predicted: ``[Q, A, hidden]``."""
    x, _ = _read(module, group, 0)
    return jnp.take_along_axis(x, group.positions[..., None], axis=1)


def _read(module: VLM, group: Group, room: int) -> tuple[jax.Array, KVCache]:
    """The stream of all ids, ``[Q, T, hidden]``, and the cache with ``room`` for more tokens."""
    language, fronts = module.language, group.fronts
    pictures, first = fronts.input_ids.shape
    length = group.ids.shape[1]
    cache = language.init_cache(pictures, first + length + room)
    cache = _rows(module.read(fronts, cache)[1], group.owner)
    behind = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), group.ids.shape)
    classes = language.classes(group.ids, first + behind, jnp.where(group.given < 0, -1, TEXT))
    classes = jnp.where(group.given == 1, TEXT, classes)  # as in decoding
    return _step(language, group, cache, group.ids, behind, classes)


def _step(language, group: Group, cache: KVCache, ids, behind, classes):
    """One step of the language model with tokens ``behind`` so many others of their question."""
    start = group.fronts.next_position[group.owner][:, None]  # a picture may take fewer places
    positions = jnp.broadcast_to(start + behind, (language.cfg.position_streams, *ids.shape))
    order = group.fronts.input_ids.shape[1] + behind
    return language.step(language.embed(ids), positions, order, classes, cache, visual_slots=0)


@partial(jax.jit, static_argnames="most")
def _greedy(module: VLM, group: Group, stop: jax.Array, most: int) -> jax.Array:
    """Up to ``most`` tokens after each question, int32 ``[Q, most]``; ``stop`` ends an answer. What
    comes after it is left to the caller."""
    language = module.language
    x, cache = _read(module, group, most)
    last = group.positions[:, :1]

    def likeliest(x: jax.Array) -> jax.Array:
        return language.logits(x).argmax(-1).astype(jnp.int32)

    def goes_on(carry):
        i, ended, *_ = carry
        return (i < most) & ~ended.all()

    def step(carry):
        i, ended, out, ids, cache = carry
        out = jax.lax.dynamic_update_slice(out, ids, (jnp.int32(0), i))
        x, cache = _step(language, group, cache, ids, last + 1 + i, jnp.full_like(ids, TEXT))
        return i + 1, ended | (ids[:, 0] == stop), out, likeliest(x), cache

    first = likeliest(jnp.take_along_axis(x, last[..., None], axis=1))
    ended, out = group.labels[:, 0] < 0, jnp.full((len(first), most), stop, jnp.int32)
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), ended, out, first, cache))[2]


def greedy(
    module: VLM, questions: Sequence[Asked], collate: Collate, stop: int, most: int
) -> list[Asked]:
    """The questions with the model's own greedy answers, their end included, cut after ``most``
    tokens."""
    open_ = [dataclasses.replace(q, answer=(0,)) for q in questions]  # of one token
    found = []
    for group in groups(open_, collate):
        tokens = np.asarray(_greedy(module, group, np.int32(stop), most))
        found += tokens[group.labels[:, 0] >= 0].tolist()
    ends = ([*f, stop].index(stop) + 1 for f in found)
    return [
        dataclasses.replace(q, answer=tuple(f[:end]))
        for q, f, end in zip(questions, found, ends, strict=True)
    ]


def _rows(cache: KVCache, rows: jax.Array) -> KVCache:
    """A cache with some of its rows, repeated."""
    take = partial(jnp.take, indices=rows, axis=1)
    return dataclasses.replace(
        cache,
        k=jax.tree.map(take, cache.k), v=jax.tree.map(take, cache.v),
        order=cache.order[rows], span=cache.span[rows],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the float model predicts: its stream per group, and itself, for its head."""

    module: VLM
    streams: list[jax.Array]


@jax.jit
def _streams(module: VLM, group: Group) -> jax.Array:
    return answer_streams(module, group)


@jax.jit
def _scores(module: VLM, stream: jax.Array, labels: jax.Array, reference: tuple[VLM, jax.Array]):
    """Per question: whether the answer is right, and summed over its tokens the KL from the
    reference and how often both find the same token the likeliest."""
    ours, theirs = (m.language.logits(x) for m, x in ((module, stream), reference))
    real = labels >= 0
    right = ((ours.argmax(-1) == labels) | ~real).all(-1)
    log_p, log_q = jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    return right, jnp.where(real, kl, 0).sum(-1), (same & real).sum(-1)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per question, in order.

    Attributes:
        right: bool, the greedy answer is the expected one.
        kl: float64, summed over the answer's tokens, in nats.
        agreeing: int, tokens of the answer at which the float model predicts the same.
    """

    right: np.ndarray
    kl: np.ndarray
    agreeing: np.ndarray


def reference(module: VLM, packed: Sequence[Group]) -> Reference:
    """Keep what a float model predicts, as a stream: its logits would be large."""
    return Reference(module, [_streams(module, group) for group in packed])


def scores(module: VLM, packed: Sequence[Group], against: Reference) -> Scores:
    """Answer all questions with a model, which may be the reference itself."""
    parts = [[np.zeros(0, bool), np.zeros(0), np.zeros(0, np.int32)]]
    for i, group in enumerate(packed):
        theirs = against.streams[i]
        ours = theirs if module is against.module else _streams(module, group)
        found = _scores(module, ours, group.labels, (against.module, theirs))
        parts.append([np.asarray(x)[group.labels[:, 0] >= 0] for x in found])
    right, kl, agreeing = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Scores(right, kl.astype(np.float64), agreeing)
