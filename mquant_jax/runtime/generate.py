"""Prefill and decode as compiled programs over pytrees.

:func:`prefill` and :func:`decode` are the low-level interface, pure functions of ``(model, ...)``.
:class:`Generator` compiles the vision tower, the prefill and the decode loop as separate programs
for a bounded number of sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Batch
from mquant_jax.runtime import buckets, steps
from mquant_jax.runtime.buckets import PIECE
from mquant_jax.runtime.input_shapes import (
    piece_shapes,
    prompt_shapes,
    shape_of,
    shapes_of,
    vision_shapes,
)
from mquant_jax.runtime.programs import PROGRAMS, Programs
from mquant_jax.runtime.prompts import Pictures, Prompts, on_host, split_pictures, split_prompts
from mquant_jax.runtime.sampling import RowSampling, Sampling, per_row
from mquant_jax.runtime.split_layers import split_layers
from mquant_jax.runtime.steps import Answers, DecodeState, Entry, decode, extend, prefill
from mquant_jax.runtime.tokens import uses_aifs

__all__ = ["KV_CACHES", "DecodeState", "Generation", "Generator", "decode", "extend", "prefill"]

KV_CACHES = ("float", "int8")
_OWNERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated tokens and times.

    Attributes:
        tokens: the generated ids of each row, without the stop token.
        stopped: for each row, whether a stop token ended it (otherwise the limit did).
        prefill_seconds: vision tower, prefill and first token.
        decode_seconds: all later tokens.
        steps: number of decode steps.
    """

    tokens: list[list[int]] = dataclasses.field(repr=False)
    stopped: list[bool]
    prefill_seconds: float
    decode_seconds: float
    steps: int


class Generator:
    """A model with its compiled programs.

    Pictures and prompts of a batch run in groups of equal padded size, then all rows decode
    together (:mod:`mquant_jax.runtime.buckets` defines the sizes). Padding and the other rows
    change a row's answer by no more than rounding.

    Args:
        layout: ``masked`` keeps the order of tokens, ``aifs`` moves visual tokens to the front,
            ``auto`` takes the faster one (:func:`mquant_jax.runtime.tokens.uses_aifs`).
        kv_cache: ``float`` (the model's dtype), or ``int8``: half or a quarter of the memory.
        programs: cache of compiled programs; by default the one of the process.

    Attributes:
        programs: ``len(programs)`` counts all programs that are alive, ``programs.keys(owner)``
            lists those of this model.
    """

    def __init__(
        self,
        model: VLM,
        stop_ids: tuple[int, ...],
        layout: str = "auto",
        kv_cache: str = "float",
        programs: Programs = PROGRAMS,
    ):
        if kv_cache not in KV_CACHES:
            raise UserError(f"kv_cache is {kv_cache!r}; known: {', '.join(KV_CACHES)}")
        self.model, self.stop_ids, self.aifs = model, tuple(stop_ids), uses_aifs(model, layout)
        self.int8_cache, self.programs = kv_cache == "int8", programs
        self.graphdef, self.params = nnx.split(model)
        self.platform = jax.default_backend()
        self.cursors = self.platform == "cpu"  # elsewhere one place for all rows is faster
        self.owner = next(_OWNERS)
        self._nothing: jax.Array | None = None
        weakref.finalize(self, programs.forget, self.owner).atexit = False

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int,
        how: Sampling = Sampling(),
        key: jax.Array | None = None,
        on_tokens: Callable[[np.ndarray], None] | None = None,
    ) -> Generation:
        """Generate until every row has stopped or reached ``max_new_tokens``.

        Args:
            batch: left-padded prompts.
            key: sampling key; default ``jax.random.key(0)``. A row's samples depend on the key and
                the row's index in the batch.
            on_tokens: called after every step with the new ids, int32 ``[B]``. It costs one host
                round trip per token; without it the whole loop is one program. Rows that have
                stopped repeat their stop token.
        """
        t0 = time.perf_counter()
        count = batch.order.shape[0]
        answers = self.start(batch, max_new_tokens)
        drawing = per_row(how, key, answers.count.shape[0])
        answers = self.run(answers, 1, drawing)
        answers.count.block_until_ready()
        t1 = time.perf_counter()
        if on_tokens is None:
            answers = self.run(answers, max_new_tokens, drawing)
        else:
            answers = self._stream(answers, count, max_new_tokens, drawing, on_tokens)
        lengths = np.asarray(answers.count)[:count]
        t2 = time.perf_counter()
        rows = [
            row[:n].tolist() for row, n in zip(np.asarray(answers.tokens), lengths, strict=False)
        ]
        stopped = [row[-1] in self.stop_ids for row in rows]
        tokens = [row[:-1] if stop else row for row, stop in zip(rows, stopped, strict=True)]
        return Generation(tokens, stopped, t1 - t0, t2 - t1, int(lengths.max()) - 1)

    def start(self, batch: Batch, max_new_tokens: int) -> Answers:
        """Run the vision tower and the prefill; padding rows are done from the start."""
        batch = on_host(batch)
        features = self._see(batch)
        entries: list[tuple[int, list[int], Entry]] = []
        for group in split_prompts(self.model, batch, self.aifs, self.platform):
            found = self._read(group, features)
            entries += zip(group.rows, _held_pieces(group.batch), found, strict=True)
        longest = max(len(held) for _, held, _ in entries) * PIECE
        slots = buckets.slots(longest + max_new_tokens)
        rows = buckets.rows(batch.order.shape[0])
        answers = self.program("empty", rows, slots)(self.params)
        insert = self.program("insert", rows, slots)
        for row, held, entry in entries:
            for i, piece in enumerate(held):
                one = dataclasses.replace(entry, pieces=(entry.pieces[piece],))
                answers = insert(answers, one, np.int32(row), np.int32(i * PIECE))
        return answers

    def run(self, answers: Answers, until: int, how: RowSampling) -> Answers:
        """Decode every row up to token ``until``; ``answers`` is donated."""
        rows, slots = answers.tokens.shape
        limit = np.full(rows, until, np.int32)
        return self.program("decode", rows, slots)(self.params_for(rows), answers, limit, how)

    def warm_up(
        self,
        *,
        rows: int = 1,
        prompt: int = 512,
        picture: int = 1024,
        new_tokens: int = 128,
        progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
    ) -> int:
        """Compile the programs for requests up to these sizes, within the limit on live programs.

        Args:
            rows: prompts per batch.
            prompt: tokens of the longest prompt, including those of its pictures.
            picture: patches of the largest picture.
            new_tokens: tokens of the longest answer.

        Returns:
            The number of programs alive afterwards.
        """
        wanted = list(itertools.islice(
            self._sizes(rows, prompt, picture, new_tokens), self.programs.limit
        ))  # fmt: skip
        for kind, sizes in progress(wanted, "compile"):
            self.program(kind, *sizes)
        return len(self.programs)

    def _sizes(self, rows: int, prompt: int, picture: int, new_tokens: int):
        """``(kind, sizes)`` of the programs for such requests, single rows and pictures first."""
        slots = list(buckets.up_to(prompt + PIECE + new_tokens, buckets.slots))
        for b in buckets.up_to(rows, buckets.rows):
            for s in slots:
                yield from ((kind, (b, s)) for kind in ("empty", "insert", "decode"))
        prompts = [] if self.aifs else list(buckets.up_to(prompt, buckets.prompt))
        yield from (("read", (1, t, self.feature_pieces(0, 1, t), None)) for t in prompts)
        yield from (("see", sizes) for sizes in self.picture_sizes(picture))
        for t in prompts:
            for b in sorted(set(buckets.groups(rows, t, self.platform)) - {1}):
                yield "read", (b, t, self.feature_pieces(0, b, t), None)

    def picture_sizes(self, picture: int) -> Iterator[tuple[int, int]]:
        """Of the programs for single pictures of up to so many patches, where they differ."""
        tower = self.model.vision
        if tower is not None and tower.takes_any_size:
            unit = tower.patches_per_token
            for p in buckets.up_to(picture, lambda n: buckets.patches(n, unit)):
                yield 1, p

    def _see(self, batch: Batch) -> dict[tuple[int, int], jax.Array]:
        """Visual features by ``(picture, piece)``."""
        out: dict[tuple[int, int], jax.Array] = {}
        if batch.vision is None:
            return out
        for group in split_pictures(self.model.vision, batch.vision, self.platform):
            for row, parts in zip(group.rows, self.see(group), strict=True):
                out |= {(row, i): part for i, part in enumerate(parts)}
        return out

    def see(self, group: Pictures) -> Sequence[tuple[jax.Array, ...]]:
        """For each picture of a group, its features in pieces ``[PIECE, feature_width]``."""
        program = self.program("see", *group.vision.valid.shape)
        return program(self.params_for(group.vision.valid.size), group.vision)

    def _read(self, group: Prompts, features: dict) -> Sequence[Entry]:
        rows, width = group.batch.order.shape
        parts = self.filled_up([features[piece] for piece in group.features], rows, width)
        program = self.program("read", rows, width, len(parts), group.batch.visual_slots)
        return program(self.params_for(rows * width), group.batch, parts)

    def filled_up(self, parts: Sequence[jax.Array], rows: int, width: int) -> tuple[jax.Array, ...]:
        """Feature pieces, filled up to the number that a prefill of these sizes takes. No token
        reads the added ones."""
        missing = self.feature_pieces(len(parts), rows, width) - len(parts)
        return (*parts, *[self._zeros()] * missing)

    def feature_pieces(self, needed: int, rows: int, width: int) -> int:
        """Number of feature pieces that a prefill takes; 0 for a model without a vision tower."""
        if self.model.vision is None:
            return 0
        return buckets.feature_pieces(needed, rows, width)

    def _zeros(self) -> jax.Array:
        if self._nothing is None:
            zeros = np.zeros((PIECE, self.model.feature_width), self.model.language.dtype)
            self._nothing = jax.device_put(zeros)
        return self._nothing

    def force(self, batch: Batch, answers: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Score given answers token by token (teacher forcing).

        Args:
            answers: ids for every row of the batch.

        Yields:
            float32 ``[B, vocab]``: log-probabilities of token 0, 1, ... of every answer, one more
            than the longest answer has tokens. Rows past the end of their answer are meaningless.
        """
        longest = max(map(len, answers))
        fed = self.start(batch, longest + 1)
        rows, slots = fed.tokens.shape
        for i in range(longest + 1):
            tokens = np.zeros(rows, np.int32)
            if i:
                tokens[: len(answers)] = [a[i - 1] if i <= len(a) else 0 for a in answers]
            force = self.program("force", rows, slots, i == 0)
            expected, fed = force(self.params_for(rows), fed, tokens)
            yield np.asarray(expected)[: len(answers)]

    def _stream(self, answers: Answers, count: int, limit: int, how: RowSampling, on_tokens):
        step = 1
        while True:
            lengths = np.asarray(answers.count)[:count]
            tokens = np.asarray(answers.tokens)[:count]
            on_tokens(tokens[np.arange(count), np.minimum(lengths, step) - 1])
            if step == limit or bool(np.asarray(answers.done).all()):
                return answers
            step += 1
            answers = self.run(answers, step, how)

    def program(self, kind: str, *sizes) -> Any:
        """The program of a kind and its sizes."""
        return self.programs.get(
            self.owner, (kind, *sizes), lambda: getattr(self, f"_compile_{kind}")(*sizes)
        )

    def params_for(self, rows: int) -> Any:
        """The parameters as programs take them whose products have so many rows."""
        return self._split if rows > 1 and self.platform == "cpu" else self.params

    @cached_property
    def _split(self) -> Any:
        return split_layers(self.params)

    def bound(self, step: Callable) -> Callable:
        """``step(model, ...)`` as a function of ``(params, ...)``."""
        return lambda params, *rest: step(nnx.merge(self.graphdef, params), *rest)

    def compiled(
        self, step: Callable, *args: Any, donate: int | None = None, params: Any = None
    ) -> Any:
        """``step(model, *args)`` as a program of parameters and ``args``.

        Args:
            donate: number of the argument to donate, counted from the parameters on.
            params: in the form in which the program takes them; ``None``: as they are held.
        """
        donated = () if donate is None else (donate,)
        jitted = jax.jit(self.bound(step), donate_argnums=donated)
        return jitted.lower(self.params if params is None else params, *args).compile()

    def _over_rows(
        self,
        step: Callable,
        arguments: Callable[[int], tuple],
        rows: int,
        donate: int | None = None,
    ) -> Any:
        """``step(model, *arguments(rows))`` as a program for the shapes of ``rows`` rows."""
        return self.compiled(step, *arguments(rows), donate=donate, params=self.params_for(rows))

    def _compile_see(self, rows: int, patches: int) -> Any:
        vision, params = vision_shapes(self.model, rows, patches), self.params_for(rows * patches)
        return self.compiled(steps.see, vision, params=params)

    def _compile_read(self, rows: int, width: int, count: int, visual_slots: int | None) -> Any:
        def read(model: VLM, batch: Batch, features: tuple) -> tuple[Entry, ...]:
            return steps.read(model, batch, features, self.int8_cache)

        batch = prompt_shapes(self.model, rows, width, visual_slots)
        params = self.params_for(rows * width)
        return self.compiled(read, batch, piece_shapes(self.model, count), params=params)

    def _empty(self, rows: int, slots: int) -> Callable[[VLM], Answers]:
        return lambda model: steps.empty(model, rows, slots, self.int8_cache, self.cursors)

    def _answers(self, rows: int, slots: int) -> Answers:
        return jax.eval_shape(self.bound(self._empty(rows, slots)), self.params)

    def _compile_empty(self, rows: int, slots: int) -> Any:
        return self.compiled(self._empty(rows, slots))

    def _compile_insert(self, rows: int, slots: int) -> Any:
        # A batch of one row with one piece has the shapes of an entry.
        one, i32 = self._answers(1, PIECE), shape_of((), np.int32)
        cache = one.state.cache
        hidden = shape_of(one.hidden.shape[1:], one.hidden.dtype)
        entry = Entry(((cache.k, cache.v, cache.order),), hidden, i32, i32, i32)
        jitted = jax.jit(steps.insert, donate_argnums=0)
        return jitted.lower(self._answers(rows, slots), entry, i32, i32).compile()

    def _compile_decode(self, rows: int, slots: int) -> Any:
        def run(model: VLM, answers: Answers, until: jax.Array, how: RowSampling) -> Answers:
            return steps.run(model, answers, until, how, self.stop_ids)

        def arguments(n: int) -> tuple[Answers, Any, RowSampling]:
            how = shapes_of(per_row(Sampling(), None, n))
            return self._answers(n, slots), shape_of((n,), np.int32), how

        return self._over_rows(run, arguments, rows, donate=1)

    def _compile_force(self, rows: int, slots: int, first: bool) -> Any:
        def force(model: VLM, answers: Answers, tokens: jax.Array) -> tuple[jax.Array, Answers]:
            return steps.force(model, answers, tokens, first)

        return self._over_rows(
            force, lambda n: (self._answers(n, slots), shape_of((n,), np.int32)), rows, donate=1
        )


def _held_pieces(batch: Batch) -> list[list[int]]:
    """For each row, the pieces of its cache entries that hold a token."""
    missing = -batch.order.shape[1] % PIECE
    order = np.pad(np.asarray(batch.order), ((0, 0), (0, missing)), constant_values=-1)
    held = np.any(order.reshape(len(order), -1, PIECE) >= 0, axis=2)
    return [np.flatnonzero(row).tolist() or [0] for row in held]
