"""Continuous batching: requests of any kind share a fixed number of decode slots.

One thread runs the device. It turns between chunks of new prompts and decode steps of all running
requests, so a long prompt delays the others by one chunk at a time. A request enters a slot as soon
as one is free, and leaves it within a step of its end or cancellation.

What is guaranteed. A request's row is computed from that row alone, by programs whose sizes depend
on the request and on the engine's options, not on other requests. So

- a greedy answer does not depend on the requests beside it, nor on the order of their arrival, on
  CPU to the bit;
- the draws of a sampled answer depend on its seed and on the place of the token in the answer; with
  equal seeds, answers are equal;
- answers with reuse equal those without: the pictures' features and the cache entries of a prompt's
  beginning that are taken from earlier requests are the results of the same programs on the same
  inputs. Entries are kept for whole chunks of prompts, not for answers.

On CPU (jax 0.10.2) a row has the same bits in any company. A prompt is read alone. In a decode step
attention runs row by row; rotations and norms sum a row in one order for any number of rows, and so
do products of integers and those of two or more rows of floats. XLA sums a single row of floats in
another order, so models with float products decode in programs of several rows, alone or not.

Products of integers (``w4a8``, ``w8a8``) also give the same bits in ``generate``: attention sums
the keys of a row in one order, whole or in chunks, in any bucket. Its greedy answers are then the
engine's (tests/mquant_jax/test_engine_bits.py). Not so with an int8 cache, from which a later chunk
reads rounded keys, nor in models with a visual expert, whose tokens ``generate`` rearranges. With
float products both agree up to rounding.

On accelerators all slots take part in every step, so its program is always the same. A request may
get another slot in another company, and a backend may sum another row of a product in another
order; none is known to.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import threading
from collections import deque
from typing import Any, Protocol

from mquant_jax.errors import PromptTooLong, QueueFull, UserError
from mquant_jax.models.base import Processor, Prompt, longest
from mquant_jax.runtime import buckets
from mquant_jax.runtime.buckets import PIECE
from mquant_jax.runtime.engine_programs import Progress
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.prefill import plan
from mquant_jax.runtime.requests import Clock, Request, RequestOptions
from mquant_jax.runtime.rows import Rows, Work, start_of
from mquant_jax.runtime.text_stream import TextStream
from mquant_jax.validate import count

log = logging.getLogger(__name__)

MOST_CONTEXT = 4096  # tokens of a slot where the caller does not say
CHUNK = {"cpu": 256}
CHUNK_ELSEWHERE = 512


class Served(Protocol):
    """What an engine needs of a :class:`mquant_jax.api.Model`."""

    processor: Processor

    @property
    def generator(self) -> Generator: ...

    @property
    def max_positions(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done.

    Attributes:
        queued, running: requests that wait, and that hold a slot.
        finished, cancelled, failed: requests that have ended, each counted once.
        prompt_tokens, tokens: read and generated.
        steps: decode steps run.
        prefill_seconds, decode_seconds: of the device thread, in either.
        picture_hits, picture_misses: rows of the vision tower (pictures, frames or tiles) that were
            there already, and that were not.
        reused_tokens: prompt tokens whose cache entries were there already.
        kept_bytes: of features and cache entries.
    """

    queued: int = 0
    running: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    picture_hits: int = 0
    picture_misses: int = 0
    reused_tokens: int = 0
    kept_bytes: int = 0


class Engine:
    """A model that answers many requests at once. Close it, or use it as a context manager.

    Args:
        model: from :func:`mquant_jax.load`.
        slots: requests that decode together.
        context: tokens of a prompt and its answer together; ``None``: the model's, 4096 at most.
        queue: requests that may wait for a slot.
        reuse_bytes: memory for features of pictures and cache entries of prompts that have been
            seen; 0 keeps nothing.
        prefill_chunk: tokens of a prompt that run at once, a multiple of 64; ``None``: 256 on CPU,
            512 elsewhere. Cache entries are reused for whole chunks.

    The cache takes ``slots * context`` tokens of memory from the beginning.

    Raises:
        UserError: a value of another type or range.
    """

    def __init__(
        self,
        model: Served,
        *,
        slots: int = 8,
        context: int | None = None,
        queue: int = 256,
        reuse_bytes: int = 256 << 20,
        prefill_chunk: int | None = None,
    ):
        self.model = model
        self.context = _context(context, model.max_positions)
        self.queue = count(queue, "queue")
        chunk = min(_chunk(prefill_chunk, model.generator.platform), _up(self.context, PIECE))
        sizes = count(slots, "slots"), _up(buckets.slots(self.context), chunk), chunk
        self._rows = Rows(model.generator, *sizes, count(reuse_bytes, "reuse_bytes", least=0))
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closing = self._stopping = False
        self._failed = 0
        self._thread = threading.Thread(target=self._work, name="mquant-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, drain=False)

    def submit(self, prompt: Prompt, options: RequestOptions = RequestOptions()) -> Request:
        """Queue a prompt. Never waits for the device.

        Raises:
            QueueFull: as many requests as may are waiting.
            PromptTooLong: the prompt leaves no room for an answer in ``context``.
            PromptError: ids that the model does not know, or placeholders and pictures that differ.
            UserError: the engine is closed.
        """
        if not isinstance(options, RequestOptions):
            raise UserError(f"options is of type {type(options).__name__}; expected RequestOptions")
        self._check_room()
        tokens = longest([prompt])
        if tokens >= self.context:
            raise PromptTooLong(
                f"prompt has {tokens} tokens, the engine's context is {self.context}: shorten the "
                "text, use smaller pictures, or give the engine a larger context"
            )
        work = self._prepared(prompt, options)
        with self._changed:
            self._check_room()
            self._waiting.append(work)
            self._changed.notify_all()
        return work.request

    def warm_up(
        self,
        *,
        prompt: int = 512,
        picture: int = 1024,
        progress: Progress = lambda items, label: items,
    ) -> int:
        """Compile what requests up to these sizes need, as far as the limit of programs goes: a
        first request then waits for no compiler. Programs for more tokens follow when they are
        needed. May be called at any time.

        Args:
            prompt: tokens of the longest prompt, its pictures' included.
            picture: patches of the largest picture.

        Returns:
            How many programs are alive then.

        Raises:
            UserError: a value of another type or range.
        """
        tokens = min(count(prompt, "prompt"), self.context)
        return self._rows.programs.warm_up(tokens, count(picture, "picture"), progress)

    def stats(self) -> EngineStats:
        """What the engine does now and has done."""
        with self._changed:
            rows = self._rows
            counts: dict[str, Any] = dict(rows.counts)
            now = {"queued": len(self._waiting), "running": rows.programs.rows - len(rows.free)}
            return EngineStats(**now, **counts, failed=self._failed, kept_bytes=rows.kept.bytes)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and wait for the end.

        Args:
            drain: answer what has been submitted; else cancel it.
        """
        with self._changed:
            self._closing = True
            self._stopping |= not drain
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(drain=kind is None)

    def _check_room(self) -> None:
        with self._changed:
            if self._closing:
                raise UserError("the engine is closed: make a new one")
            if len(self._waiting) >= self.queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, the engine's queue holds "
                    f"{self.queue}: try again later, or give the engine a longer queue"
                )

    def _prepared(self, prompt: Prompt, options: RequestOptions) -> Work:
        processor, clock = self.model.processor, Clock()
        batch, size = processor.collate([prompt]), self._rows.programs.chunk
        made = plan(self.model.generator.model, batch, size)
        return Work(
            Request(made.columns, options, self._wake),
            made,
            start_of(made, options),
            min(options.max_new_tokens, self.context - made.columns),
            TextStream(processor.decode, options.stop),
            clock,
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """The device's thread."""
        while self._next():
            try:
                self._rows.turn()
            except Exception as e:
                log.exception("the engine failed; %d requests are lost", len(self._rows.works()))
                self._lose(e)

    def _next(self) -> bool:
        """Wait until there is something to run; whether there will be."""
        with self._changed:
            while True:
                self._drop_cancelled()
                while self._waiting and self._rows.free:
                    self._rows.admit(self._waiting.popleft())
                if self._rows.works():
                    return True
                if self._closing:
                    return False
                self._changed.wait()

    def _drop_cancelled(self) -> None:
        if self._stopping:
            for work in [*self._waiting, *self._rows.works()]:
                work.request.cancelled = True
        self._rows.drop_cancelled()
        for work in [w for w in self._waiting if w.request.cancelled]:
            self._waiting.remove(work)
            self._rows.counts["cancelled"] += 1
            work.finish("cancelled")

    def _lose(self, error: Exception) -> None:
        """Fail the requests that hold a slot, whose state is lost; the others go on."""
        with self._changed:
            for work in self._rows.works():
                self._failed += 1
                work.request.fail(error)
            self._rows.reset()


def _context(context: int | None, most: int) -> int:
    return min(most, MOST_CONTEXT) if context is None else count(context, "context", 2, most)


def _chunk(size: int | None, platform: str) -> int:
    if size is None:
        return CHUNK.get(platform, CHUNK_ELSEWHERE)
    if count(size, "prefill_chunk") % PIECE:
        raise UserError(f"prefill_chunk is {size}; expected a multiple of {PIECE}")
    return int(size)


def _up(n: int, unit: int) -> int:
    """The least multiple of ``unit`` that holds ``n``."""
    return -(-n // unit) * unit
