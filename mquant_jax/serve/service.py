"""Connects the event loop to the engine: submits requests, streams answers back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mquant_jax.runtime.chats import MAX_NEW_TOKENS, chat_options
from mquant_jax.runtime.engine import Engine, Served
from mquant_jax.runtime.requests import Answer, Request, RequestOptions
from mquant_jax.serve.errors import ApiError
from mquant_jax.serve.metrics import Metrics
from mquant_jax.serve.wire import ChatRequest, read_request
from mquant_jax.validate import count

_READERS = 2  # threads that decode pictures and build prompts


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests, validated on construction.

    Attributes:
        body_bytes: size of a request.
        pixels: total over the pictures of a request.
        prompt_tokens: per prompt, including its pictures; ``None``: the engine's context.
        max_new_tokens: default length limit of an answer.
        requests: read, queued or answered at the same time.
        body_seconds: time for a request to arrive.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    body_bytes: int = 64 << 20
    pixels: int = 64 << 20
    prompt_tokens: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    requests: int = 264
    body_seconds: int = 60

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                count(value, field.name)


class Service:
    """A served model.

    Args:
        model: from :func:`mquant_jax.load`.
        engine: the model's engine; the caller closes it.
        name: the model's name.
        limits: limits of requests.
    """

    def __init__(self, model: Served, engine: Engine, name: str, limits: Limits = Limits()):
        self.processor, self.engine, self.name, self.limits = model.processor, engine, name, limits
        self.metrics = Metrics(engine)
        self.closing = False
        self._busy = 0  # requests being read or answered
        self._open: set[Request] = set()
        self._readers = ThreadPoolExecutor(_READERS, "mquant-reader")
        self._waiters = ThreadPoolExecutor(limits.requests, "mquant-waiter")

    def admit(self) -> None:
        """Count one more request; call :meth:`leave` when it ends.

        Raises:
            ApiError: the server is shutting down or full.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down; try another one", "shutting_down")
        if self._busy >= self.limits.requests:
            raise ApiError(429, f"{self._busy} requests are being answered, the limit of this "
                           "server; try again later", "queue_full",
                           headers={"Retry-After": "1"})  # fmt: skip
        self._busy += 1

    def leave(self) -> None:
        self._busy -= 1

    async def submit(self, body: bytes) -> tuple[ChatRequest, Request]:
        """Submit the request in a body to the engine; pictures are decoded off the event loop.

        Raises:
            ApiError, UserError: the request is refused.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._submit, body)

    def _submit(self, body: bytes) -> tuple[ChatRequest, Request]:
        asked = read_request(body, self.name, self.limits.pixels)
        prompt = self.processor.chat(asked.messages)
        found, most = len(prompt.input_ids), self.limits.prompt_tokens
        if most is not None and found > most:
            raise ApiError(400, f"the prompt has {found} tokens with its pictures; this server "
                           f"accepts {most}: shorten the text or send smaller pictures",
                           "context_length_exceeded", "messages")  # fmt: skip
        options: dict[str, Any] = {"max_new_tokens": self.limits.max_new_tokens, **asked.options}
        request = self.engine.submit(prompt, chat_options(self.processor, options))
        self._open.add(request)
        return asked, request

    async def deltas(self, request: Request) -> AsyncGenerator[str | Answer]:
        """Stream the pieces of an answer's text, then the answer.

        The request is cancelled if the generator is closed early.

        Raises:
            ApiError: the engine failed, or the server shut down.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        pumped = loop.run_in_executor(self._waiters, _pump, request, put)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise ApiError(500, f"the answer failed: {item}", "engine_failed") from item
                if isinstance(item, Answer):
                    yield self._checked(item)
                    return
                yield item
        finally:
            request.cancel()
            self._open.discard(request)
            await asyncio.shield(pumped)

    def _checked(self, answer: Answer) -> Answer:
        if answer.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down; the answer is not complete",
                           "shutting_down")  # fmt: skip
        self.metrics.answered(answer)
        return answer

    def warm_up(self) -> None:
        """Generate a short answer, so that the programs are compiled before the first request.

        Raises:
            UserError: the model cannot answer chats.
        """
        prompt = self.processor.chat([{"role": "user", "content": "Hello"}])
        self.engine.submit(prompt, RequestOptions(max_new_tokens=2)).result()

    def cancel_all(self) -> None:
        """Cancel all running requests."""
        for request in list(self._open):
            request.cancel()

    def close(self) -> None:
        """Shut down the threads."""
        self.closing = True
        self.cancel_all()
        self._readers.shutdown()
        self._waiters.shutdown()


def _pump(request: Request, put: Callable[[Any], Any]) -> None:
    """Forward a request's output. Runs in a thread, because it blocks."""
    try:
        for delta in request:
            put(delta)
        put(request.result())
    except Exception as e:
        put(e)
