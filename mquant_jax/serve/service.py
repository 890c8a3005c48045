"""One model that answers chats: requests go to the engine, answers come back to the event loop."""

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

_READERS = 2  # threads that decode pictures and make prompts


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for; checked when it is made.

    Attributes:
        body_bytes: of a request.
        pixels: of a request's pictures together.
        prompt_tokens: of a prompt, pictures included; ``None``: what the engine's context holds.
        max_new_tokens: of an answer, where the request does not say.
        requests: that are read, queued or answered at the same time.
        body_seconds: for a request to arrive.

    Raises:
        UserError: a value of another type or range.
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
    """A model behind the interface.

    Args:
        model: from :func:`mquant_jax.load`.
        engine: of that model; the caller closes it.
        name: of the model.
        limits: what a client may ask for.
    """

    def __init__(self, model: Served, engine: Engine, name: str, limits: Limits = Limits()):
        self.processor, self.engine, self.name, self.limits = model.processor, engine, name, limits
        self.metrics = Metrics(engine)
        self.closing = False
        self._busy = 0  # requests that are read or answered
        self._open: set[Request] = set()
        self._readers = ThreadPoolExecutor(_READERS, "mquant-reader")
        self._waiters = ThreadPoolExecutor(limits.requests, "mquant-waiter")

    def admit(self) -> None:
        """One more request; :meth:`leave` is its end.

        Raises:
            ApiError: the server ends, or has as many requests as it may hold.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down; ask another one", "shutting_down")
        if self._busy >= self.limits.requests:
            raise ApiError(429, f"{self._busy} requests are being answered, as many as the server "
                           "holds; try again later", "queue_full",
                           headers={"Retry-After": "1"})  # fmt: skip
        self._busy += 1

    def leave(self) -> None:
        self._busy -= 1

    async def submit(self, body: bytes) -> tuple[ChatRequest, Request]:
        """Give what a body asks for to the engine; pictures are decoded beside the event loop.

        Raises:
            ApiError, UserError: it is refused.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._submit, body)

    def _submit(self, body: bytes) -> tuple[ChatRequest, Request]:
        asked = read_request(body, self.name, self.limits.pixels)
        prompt = self.processor.chat(asked.messages)
        found, most = len(prompt.input_ids), self.limits.prompt_tokens
        if most is not None and found > most:
            raise ApiError(400, f"the prompt has {found} tokens, pictures included; this server "
                           f"takes {most} at most: shorten the text or send smaller pictures",
                           "context_length_exceeded", "messages")  # fmt: skip
        options: dict[str, Any] = {"max_new_tokens": self.limits.max_new_tokens, **asked.options}
        request = self.engine.submit(prompt, chat_options(self.processor, options))
        self._open.add(request)
        return asked, request

    async def deltas(self, request: Request) -> AsyncGenerator[str | Answer]:
        """The pieces of an answer's text as they come, then the answer.

        A request that nobody goes on with is cancelled.

        Raises:
            ApiError: the engine failed, or the server ended.
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
        """Answer a word, so that the first request finds the programs compiled.

        Raises:
            UserError: the model cannot answer chats.
        """
        prompt = self.processor.chat([{"role": "user", "content": "Hello"}])
        self.engine.submit(prompt, RequestOptions(max_new_tokens=2)).result()

    def cancel_all(self) -> None:
        """End what is being answered."""
        for request in list(self._open):
            request.cancel()

    def close(self) -> None:
        """Give the threads back."""
        self.closing = True
        self.cancel_all()
        self._readers.shutdown()
        self._waiters.shutdown()


def _pump(request: Request, put: Callable[[Any], Any]) -> None:
    """Pass on what a request gives, from a thread that may wait for it."""
    try:
        for delta in request:
            put(delta)
        put(request.result())
    except Exception as e:
        put(e)
