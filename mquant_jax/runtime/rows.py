"""The engine's decode slots: which request is in which, and what runs next. For one thread."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator

import jax
import numpy as np

from mquant_jax.runtime.engine_programs import EnginePrograms
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.options import SEEDS
from mquant_jax.runtime.prefill import Chunk, Plan
from mquant_jax.runtime.prompts import split_pictures
from mquant_jax.runtime.requests import Clock, FinishReason, Request, RequestOptions
from mquant_jax.runtime.reuse import Kept
from mquant_jax.runtime.sampling import RowPenalties, per_row
from mquant_jax.runtime.slots import Start
from mquant_jax.runtime.text_stream import TextStream

Features = dict[int, tuple[jax.Array, ...]]  # by row of the vision input, in pieces


@dataclasses.dataclass
class Work:
    """A request on the engine's side.

    Attributes:
        limit: the longest answer, in tokens.
        start: how its answer begins.
        hidden: ``[1, hidden]``, of the last token that has been read.
    """

    request: Request
    plan: Plan
    start: Start
    limit: int
    text: TextStream
    clock: Clock
    hidden: jax.Array | None = None

    def finish(self, reason: FinishReason) -> None:
        """Give out the rest of the text, and the answer."""
        self.request.emit(self.text.end())
        tokens = self.request.prompt_tokens
        self.request.finish(self.clock.answer(self.text.text, self.text.ids, reason, tokens))


def start_of(made: Plan, options: RequestOptions) -> Start:
    """How the answer to a prompt begins."""
    seed = secrets.randbelow(SEEDS) if options.seed is None else options.seed

    def one(value: float) -> np.ndarray:
        return np.full(1, value, np.float32)

    return Start(
        per_row(options.sampling, jax.random.key(seed), 1),
        RowPenalties(
            one(options.repetition_penalty),
            one(options.presence_penalty),
            one(options.frequency_penalty),
        ),
        np.full(1, made.length, np.int32),
        np.full(1, made.position, np.int32),
        made.present[None],
    )


class Rows:
    """All slots.

    Args:
        columns: of the cache, a multiple of ``chunk``.
        chunk: tokens of a prompt that run at once.
        reuse_bytes: of what is kept for later requests.

    Attributes:
        counts: fields of ``EngineStats``.
        kept: features and cache entries of earlier requests.
    """

    def __init__(self, generator: Generator, rows: int, columns: int, chunk: int, reuse_bytes: int):
        self.generator = generator
        self.programs = EnginePrograms(generator, rows, columns, chunk)
        self.kept = Kept(reuse_bytes)
        self.counts: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        """All rows empty, as after a failure, which may have taken the state with it."""
        self.state = self.programs.empty()
        self.free = deque(range(self.programs.rows))
        self.reading: deque[tuple[int, Work, Iterator[None]]] = deque()
        self.running: dict[int, Work] = {}

    def works(self) -> list[Work]:
        """All requests that have a row."""
        return [work for _, work, _ in self.reading] + list(self.running.values())

    def admit(self, work: Work) -> None:
        """Give a request a free row."""
        row = self.free.popleft()
        work.clock.started = time.perf_counter()
        self.reading.append((row, work, self._read(row, work)))

    def turn(self) -> None:
        """Go on with one new prompt, then decode a token for every running request."""
        began = time.perf_counter()
        if self.reading:
            row, work, job = self.reading[0]
            if next(job, "read") == "read":
                self.reading.popleft()
                self._begin(row, work)
        read = time.perf_counter()
        if self.running:
            self._step()
        self._count(prefill_seconds=read - began, decode_seconds=time.perf_counter() - read)

    def drop_cancelled(self) -> None:
        """End what has been cancelled."""
        for entry in [e for e in self.reading if e[1].request.cancelled]:
            self.reading.remove(entry)
            self._leave(*entry[:2], "cancelled")
        for row, work in list(self.running.items()):
            if work.request.cancelled:
                self._leave(row, work, "cancelled")

    def _read(self, row: int, work: Work) -> Iterator[None]:
        """Run a prompt into a row; others have their turn at each yield."""
        plan, features = work.plan, Features()
        for chunk in plan.chunks:
            last = chunk is plan.chunks[-1]
            kept = None if last else self.kept.get(chunk.key)
            if kept is None:
                yield from self._see(plan, chunk, features)
                self._read_chunk(row, work, chunk, features)
            else:
                place = row, chunk.start, plan.position
                self.state = self.programs.give(self.state, kept, *place)
                self._count(reused_tokens=chunk.tokens)
            if not last:
                yield

    def _see(self, plan: Plan, chunk: Chunk, features: Features) -> Iterator[None]:
        """Add the features of a chunk's pictures."""
        missing = []
        for picture in sorted({row for row, _ in chunk.features} - features.keys()):
            found = self.kept.get(plan.picture_keys[picture])
            if found is None:
                missing.append(picture)
            else:
                features[picture] = found
                self._count(picture_hits=1)
        if not missing:
            return
        vision = jax.tree.map(lambda x: x[missing], plan.vision)
        for group in split_pictures(self.generator.model.vision, vision, self.generator.platform):
            for i, parts in zip(group.rows, self.generator.see(group), strict=True):
                features[missing[i]] = jax.block_until_ready(parts)
                self.kept.put(plan.picture_keys[missing[i]], parts)
            self._count(picture_misses=len(group.rows))
            yield

    def _read_chunk(self, row: int, work: Work, chunk: Chunk, features: Features) -> None:
        parts = [features[picture][piece] for picture, piece in chunk.features]
        span = work.plan.position
        self.state, work.hidden = self.programs.read(self.state, chunk, parts, row, span)
        if chunk.tokens == self.programs.chunk and self.kept.limit:
            self.kept.put(chunk.key, self.programs.take(self.state, row, chunk.start))
        jax.block_until_ready(work.hidden)

    def _begin(self, row: int, work: Work) -> None:
        """Draw the first token of a prompt that has been read."""
        assert work.hidden is not None, "the last chunk of a prompt always runs"
        self.state, token = self.programs.begin(self.state, work.hidden, row, work.start)
        first = int(np.asarray(token)[0])
        work.clock.first = time.perf_counter()
        self._count(prompt_tokens=work.request.prompt_tokens)
        self.running[row] = work
        self._token(row, work, first)

    def _step(self) -> None:
        self.state, drawn = self.programs.step(self.state, list(self.running))
        self._count(steps=1)
        running = list(self.running.items())
        for (row, work), token in zip(running, drawn.tolist(), strict=True):
            self._token(row, work, token)

    def _token(self, row: int, work: Work, token: int) -> None:
        """Give out a token's text, and end the answer if it is the last."""
        if token in self.generator.stop_ids:
            self._leave(row, work, "stop")
            return
        work.request.emit(work.text.push(token))
        self._count(tokens=1)
        if work.text.stopped:
            self._leave(row, work, "stop")
        elif len(work.text.ids) == work.limit:
            self._leave(row, work, "length")

    def _leave(self, row: int, work: Work, reason: FinishReason) -> None:
        self.running.pop(row, None)
        self.free.append(row)
        self._count(**{"cancelled" if reason == "cancelled" else "finished": 1})
        work.finish(reason)

    def _count(self, **more: float) -> None:
        self.counts.update(more)
