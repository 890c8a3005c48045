"""The engine's compiled programs: one for each kind and size, made at first use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mquant_jax.models.base import VLM, Batch
from mquant_jax.runtime import buckets, slots
from mquant_jax.runtime.generate import Generator, shape_of
from mquant_jax.runtime.layers_apart import LayersApart
from mquant_jax.runtime.prefill import Chunk
from mquant_jax.runtime.slots import Columns, Slots, Start
from mquant_jax.runtime.steps import shapes_of


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
        return self._get("empty", lambda: self.generator.compiled(self._empty))(self._params)

    def read(
        self, state: Slots, chunk: Chunk, parts: list[jax.Array], row: int, span: int
    ) -> tuple[Slots, jax.Array]:
        """:func:`mquant_jax.runtime.slots.read_chunk`; ``parts`` are the chunk's features."""
        width = chunk.batch.order.shape[1]
        reach = self.reach(chunk.start, width)
        features = self.generator.filled_up(parts, 1, width)
        sizes = (width, reach, len(features), chunk.batch.visual_slots)
        program = self._get("chunk", lambda: self._compile_read(*sizes), *sizes)
        place = np.int32(row), np.int32(chunk.start), np.int32(span)
        return program(self._params, state, chunk.batch, features, *place)

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
        args = (state, hidden, np.int32(row), start)
        program = self._get("begin", lambda: self._compiled(slots.begin, *args))
        return program(self._params, *args)

    def step(self, state: Slots, running: Sequence[int]) -> tuple[Slots, np.ndarray]:
        """One more token for each of these rows: the slots, and int32 tokens in their order.

        On CPU a program takes as many rows as decode, or the next larger number of a few.
        """
        size = buckets.decoding(len(running), self.rows, self.generator.platform)
        program = self._get("step", lambda: self._compile_step(size), size)
        params = self._apart.parts if self._takes_layers_apart(size) else self._params
        if size == self.rows:
            state, tokens = program(params, state, np.isin(np.arange(size), running))
            return state, np.asarray(tokens)[running]
        others = [row for row in range(self.rows) if row not in running]
        rows = np.asarray([*running, *others][:size], np.int32)
        state, tokens = program(params, state, np.arange(size) < len(running), rows)
        return state, np.asarray(tokens)[: len(running)]

    def _takes_layers_apart(self, size: int) -> bool:
        return self.generator.platform == "cpu" and size > 1

    @functools.cached_property
    def _apart(self) -> LayersApart:
        return LayersApart(self._params)

    def take(self, state: Slots, row: int, start: int) -> Columns:
        """The columns of one whole chunk."""
        place = np.int32(row), np.int32(start)

        def compile_take() -> Any:
            def whole(state: Slots, row: jax.Array, start: jax.Array) -> Columns:
                return slots.take(state, row, start, self.chunk)

            return jax.jit(whole).lower(*shapes_of((state, *place))).compile()

        return self._get("take", compile_take)(state, *place)

    def give(self, state: Slots, columns: Columns, row: int, start: int, span: int) -> Slots:
        """:func:`mquant_jax.runtime.slots.give`."""
        args = (state, columns, np.int32(row), np.int32(start), np.int32(span))

        def compile_give() -> Any:
            return jax.jit(slots.give, donate_argnums=0).lower(*shapes_of(args)).compile()

        return self._get("give", compile_give)(*args)

    @property
    def _params(self) -> Any:
        return self.generator.params

    def _empty(self, model: VLM) -> Slots:
        return slots.empty_slots(model, self.rows, self.columns, self.generator.int8_cache)

    def _get(self, kind: str, make: Callable[[], Any], *sizes: Any) -> Any:
        key = (f"engine {kind}", self.rows, self.columns, self.chunk, *sizes)
        return self.generator.programs.get(self.generator.owner, key, make)

    def _compiled(self, step: Callable, state: Slots, *args: Any) -> Any:
        return self.generator.compiled(step, *shapes_of((state, *args)), donate=1)

    def _compile_step(self, size: int) -> Any:
        args = [self._slots, shape_of((size,), bool)]
        if size < self.rows:
            args.append(shape_of((size,), np.int32))
        if not self._takes_layers_apart(size):
            return self.generator.compiled(slots.step, *args, donate=1)
        bound = self._apart.bound(self.generator.bound(slots.step))
        return jax.jit(bound, donate_argnums=1).lower(self._apart.parts, *args).compile()

    def _compile_read(self, width: int, reach: int, count: int, visual_slots: int | None) -> Any:
        def read(model: VLM, state: Slots, batch: Batch, features: tuple, row, start, span):
            int8 = self.generator.int8_cache
            return slots.read_chunk(model, state, batch, features, row, start, span, reach, int8)

        batch = self.generator.prompt_shapes(1, width, visual_slots)
        features, one = self.generator.piece_shapes(count), shape_of((), np.int32)
        return self.generator.compiled(read, self._slots, batch, features, one, one, one, donate=1)
