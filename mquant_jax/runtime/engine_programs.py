"""The engine's compiled programs: one for each kind and size, made at first use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import ActQuant
from mquant_jax.runtime import buckets, slots
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.input_shapes import piece_shapes, prompt_shapes, shape_of
from mquant_jax.runtime.prefill import Chunk
from mquant_jax.runtime.slots import Columns, Slots, Start

Progress = Callable[[Iterable, str], Iterable]  # of items with a label
_NUMBER = shape_of((), np.int32)


class EnginePrograms:
    """What the engine runs, on top of a generator's programs.

    Args:
        rows: decode slots.
        columns: of the cache, a multiple of ``chunk``.
        chunk: tokens of a prompt that run at once.
    """

    def __init__(self, generator: Generator, rows: int, columns: int, chunk: int):
        self.generator, self.rows, self.columns, self.chunk = generator, rows, columns, chunk
        self._slots = jax.eval_shape(generator.bound(self._empty), generator.params)

    def empty(self) -> Slots:
        """Rows without a request."""
        return self._program("empty")(self._params)

    def warm_up(self, prompt: int, picture: int, progress: Progress) -> int:
        """Compile what requests of so many tokens and patches need, as far as the limit of programs
        goes; how many are alive then."""
        programs = self.generator.programs
        for make in progress(
            list(itertools.islice(self._makers(prompt, picture), programs.limit)), "compile"
        ):
            make()
        return len(programs)

    def _makers(self, prompt: int, picture: int) -> Iterator[Callable[[], Any]]:
        """What makes the programs, those that every request needs first."""
        steps = {self._step_rows(n) for n in range(1, self.rows + 1)}
        yield from (partial(self._program, kind) for kind in ("empty", "begin"))
        yield from (partial(self._program, "step", size) for size in sorted(steps))
        for sizes in self._chunk_sizes(prompt):
            yield partial(self._program, "chunk", *sizes)
        for size in self.generator.picture_sizes(picture):
            yield partial(self.generator.program, "see", *size)
        yield from (partial(self._program, kind) for kind in ("take", "give"))

    def _chunk_sizes(self, prompt: int) -> Iterator[tuple]:
        """Sizes of the programs for prompts of up to so many tokens, first chunks first."""
        starts = range(0, prompt, self.chunk)
        widths = list(buckets.up_to(min(prompt, self.chunk), buckets.prompt))
        layouts = (None, 0) if self.generator.model.language.has_experts else (None,)
        for reach in sorted({self.reach(start, self.chunk) for start in starts}):
            for width in widths:
                count = self.generator.feature_pieces(0, 1, width)
                yield from ((width, reach, count, layout) for layout in layouts)

    def read(
        self, state: Slots, chunk: Chunk, parts: list[jax.Array], row: int, span: int
    ) -> tuple[Slots, jax.Array]:
        """:func:`mquant_jax.runtime.slots.read_chunk`; ``parts`` are the chunk's features."""
        width = chunk.batch.order.shape[1]
        reach = self.reach(chunk.start, width)
        features = self.generator.filled_up(parts, 1, width)
        sizes = (width, reach, len(features), chunk.batch.visual_slots)
        place = np.int32(row), np.int32(chunk.start), np.int32(span)
        program = self._program("chunk", *sizes)
        return program(self.generator.params_for(width), state, chunk.batch, features, *place)

    def reach(self, start: int, width: int) -> int:
        """Columns that the program of a chunk looks at: none in a first chunk, else a size of which
        there are few."""
        if start == 0:
            return 0
        reach = 4 * self.chunk
        while reach < start + width:
            reach *= 4
        return min(reach, self.columns)

    def begin(self, state: Slots, hidden: jax.Array, row: int, start: Start):
        """:func:`mquant_jax.runtime.slots.begin`."""
        return self._program("begin")(self._params, state, hidden, np.int32(row), start)

    def step(self, state: Slots, running: Sequence[int]) -> tuple[Slots, np.ndarray]:
        """One more token for each of these rows: the slots, and int32 tokens in their order.

        On CPU a program takes as many rows as decode, or the next larger number of a few.
        """
        size = self._step_rows(len(running))
        program = partial(self._program("step", size), self.generator.params_for(size), state)
        if size == self.rows:
            state, tokens = program(np.isin(np.arange(size), running))
            return state, np.asarray(tokens)[running]
        others = [row for row in range(self.rows) if row not in running]
        rows = np.asarray([*running, *others][:size], np.int32)
        state, tokens = program(np.arange(size) < len(running), rows)
        return state, np.asarray(tokens)[: len(running)]

    def _step_rows(self, running: int) -> int:
        """Rows of the program for a step of so many."""
        return buckets.decoding(running, self.rows, self.generator.platform, self._alone)

    @cached_property
    def _alone(self) -> bool:
        """Whether a row decodes to the same bits alone as beside others: products of integers do,
        but XLA's CPU backend sums those of one row of floats in another order."""
        parts = (part for _, part in nnx.iter_modules(self.generator.model.language))
        return all(part.mode != "none" for part in parts if isinstance(part, ActQuant))

    def take(self, state: Slots, row: int, start: int) -> Columns:
        """The columns of one whole chunk."""
        return self._program("take")(state, np.int32(row), np.int32(start))

    def give(self, state: Slots, columns: Columns, row: int, start: int, span: int) -> Slots:
        """:func:`mquant_jax.runtime.slots.give`."""
        place = np.int32(row), np.int32(start), np.int32(span)
        return self._program("give")(state, columns, *place)

    @property
    def _params(self) -> Any:
        return self.generator.params

    def _empty(self, model: VLM) -> Slots:
        return slots.empty_slots(model, self.rows, self.columns, self.generator.int8_cache)

    def _program(self, kind: str, *sizes: Any) -> Any:
        key = (f"engine {kind}", self.rows, self.columns, self.chunk, *sizes)
        make = partial(getattr(self, f"_compile_{kind}"), *sizes)
        return self.generator.programs.get(self.generator.owner, key, make)

    def _compile_empty(self) -> Any:
        return self.generator.compiled(self._empty)

    def _compile_begin(self) -> Any:
        language = self.generator.model.language
        hidden = shape_of((1, language.cfg.hidden_size), language.dtype)
        start = jax.tree.map(lambda x: shape_of((1, *x.shape[1:]), x.dtype), self._slots.start)
        return self.generator.compiled(slots.begin, self._slots, hidden, _NUMBER, start, donate=1)

    def _take(self, state: Slots, row: jax.Array, start: jax.Array) -> Columns:
        return slots.take(state, row, start, self.chunk)

    def _compile_take(self) -> Any:
        return jax.jit(self._take).lower(self._slots, _NUMBER, _NUMBER).compile()

    def _compile_give(self) -> Any:
        columns = jax.eval_shape(self._take, self._slots, _NUMBER, _NUMBER)
        args = (self._slots, columns, _NUMBER, _NUMBER, _NUMBER)
        return jax.jit(slots.give, donate_argnums=0).lower(*args).compile()

    def _compile_step(self, size: int) -> Any:
        args = [self._slots, shape_of((size,), bool)]
        if size < self.rows:
            args.append(shape_of((size,), np.int32))
        return self.generator.compiled(
            slots.step, *args, donate=1, params=self.generator.params_for(size)
        )

    def _compile_chunk(self, width: int, reach: int, count: int, visual_slots: int | None) -> Any:
        def read(model: VLM, state: Slots, batch: Batch, features: tuple, row, start, span):
            int8 = self.generator.int8_cache
            return slots.read_chunk(model, state, batch, features, row, start, span, reach, int8)

        model = self.generator.model
        batch, features = prompt_shapes(model, 1, width, visual_slots), piece_shapes(model, count)
        args = self._slots, batch, features, _NUMBER, _NUMBER, _NUMBER
        return self.generator.compiled(
            read, *args, donate=1, params=self.generator.params_for(width)
        )
