"""The caller's side of an engine request: options, streamed text, answer."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from mquant_jax.errors import UserError
from mquant_jax.runtime.options import SEEDS
from mquant_jax.runtime.sampling import LEAST, Sampling
from mquant_jax.validate import count, kind, number, text

FinishReason = Literal["stop", "length", "cancelled"]
MOST_PENALTY = 2.0


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Options of one request, validated on construction.

    Attributes:
        max_new_tokens: maximum length of the answer, in tokens.
        temperature, top_k, top_p: as in :class:`Sampling`; ``top_k=None`` means 0.
        repetition_penalty: above zero. Of tokens that occur in the prompt or answer, positive
            logits are divided by it and others multiplied. 1 changes nothing.
        presence_penalty, frequency_penalty: -2 to 2. Subtracted from the logits of tokens that
            occur in the answer: once, and once per occurrence.
        seed: of the sampler, 0 to 2^32 - 1; ``None``: a new one for each request.
        stop: texts that end the answer and are not part of it; a single text is accepted.

    Raises:
        UserError: a value of the wrong type or out of range; the message names the option.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sampling = Sampling(self.temperature, 0 if self.top_k is None else self.top_k, self.top_p)
        checked = {
            "max_new_tokens": count(self.max_new_tokens, "max_new_tokens"),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "repetition_penalty": _factor(self.repetition_penalty, "repetition_penalty"),
            "presence_penalty": _penalty(self.presence_penalty, "presence_penalty"),
            "frequency_penalty": _penalty(self.frequency_penalty, "frequency_penalty"),
            "seed": None if self.seed is None else count(self.seed, "seed", 0, SEEDS - 1),
            "stop": _stop(self.stop),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k or 0, self.top_p)


def _factor(value: Any, name: str) -> float:
    factor = number(value, name)
    if not LEAST <= factor <= 1 / LEAST:
        raise UserError(f"{name} is {factor}; expected {LEAST:g} to {1 / LEAST:g}, 1 for none")
    return factor


def _penalty(value: Any, name: str) -> float:
    penalty = number(value, name)
    if abs(penalty) > MOST_PENALTY:
        raise UserError(f"{name} is {penalty}; expected {-MOST_PENALTY:g} to {MOST_PENALTY:g}")
    return penalty


def _stop(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise UserError(f"stop: expected a text or a list of texts, found {kind(value)}")
    for i, one in enumerate(value):
        if not text(one, f"stop {i}"):
            raise UserError(f"stop {i} is empty; expected a text that ends the answer")
    return tuple(value)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request.

    Attributes:
        text: without the stop text.
        tokens: the generated ids, without the stop token.
        finish_reason: ``stop`` (a stop token or text), ``length`` (``max_new_tokens`` or the
            engine's context) or ``cancelled``.
        prompt_tokens, completion_tokens: number of prompt and generated tokens.
        prefill_seconds: from the start of the prefill to the first token.
        decode_seconds: from the first token to the last.
        queue_seconds: from the submission to the start of the prefill.
    """

    text: str
    tokens: list[int] = dataclasses.field(repr=False)
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    queue_seconds: float


class Request:
    """A submitted request, returned by :meth:`Engine.submit`. Thread-safe."""

    def __init__(self, prompt_tokens: int, options: RequestOptions, wake: Callable[[], None]):
        self.prompt_tokens, self.options = prompt_tokens, options
        self.cancelled = False
        self._wake = wake
        self._changed = threading.Condition()
        self._deltas: list[str] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        """Stream the answer's text from its beginning; the pieces concatenate to ``result().text``.
        No piece ends inside a character or with the possible beginning of a stop text.

        Raises:
            RuntimeError: the engine failed.
        """
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._deltas) > at or self.done)  # noqa: B023
                new, done = self._deltas[at:], self.done
            yield from new
            at += len(new)
            if done and not new:
                self._raise()
                return

    def result(self, timeout: float | None = None) -> Answer:
        """The answer, once it is complete.

        Args:
            timeout: seconds to wait; ``None``: no limit.

        Raises:
            TimeoutError: no answer within ``timeout``; the request continues.
            RuntimeError: the engine failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer after {timeout} s")
        self._raise()
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        """End the answer where it is. Does nothing if it is complete."""
        self.cancelled = True
        self._wake()

    @property
    def done(self) -> bool:
        """Whether the request was answered or cancelled or has failed."""
        return self._answer is not None or self._error is not None

    def emit(self, delta: str) -> None:
        """Add text. Called by the engine."""
        if delta:
            with self._changed:
                self._deltas.append(delta)
                self._changed.notify_all()

    def finish(self, answer: Answer) -> None:
        """Complete the request. Called by the engine."""
        with self._changed:
            self._answer = answer
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the request without an answer. Called by the engine."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"the engine failed: {self._error}") from self._error

    def __repr__(self) -> str:
        state = "done" if self.done else f"{sum(map(len, self._deltas))} characters so far"
        return f"Request({self.prompt_tokens} prompt tokens, {state})"


class Clock:
    """Timestamps of one request, in seconds of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first: float | None = None

    def answer(
        self, text: str, tokens: Sequence[int], reason: FinishReason, prompt_tokens: int
    ) -> Answer:
        """The answer, ending now."""
        now = time.perf_counter()
        started = now if self.started is None else self.started
        first = now if self.first is None else self.first
        return Answer(
            text, list(tokens), reason, prompt_tokens, len(tokens),
            first - started, now - first, started - self.submitted,
        )  # fmt: skip
