"""Chats with one model: its own sampling defaults, and an engine made on first use."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.base import Processor, Prompt
from mquant_jax.runtime.engine import Engine, Served
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.requests import Request, RequestOptions

MAX_NEW_TOKENS = 512  # default length limit of an answer
_LEAST_CONTEXT = 2048
_OPTIONS = tuple(field.name for field in dataclasses.fields(RequestOptions))


def chat_options(processor: Processor, given: Mapping[str, Any]) -> RequestOptions:
    """The options of a chat. Options missing or ``None`` take the defaults in the model's files.

    Raises:
        UserError: an unknown option, or a value of the wrong type or out of range.
    """
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r}; known: {', '.join(_OPTIONS)}")
    said = {name: value for name, value in given.items() if value is not None}
    defaults = {"max_new_tokens": MAX_NEW_TOKENS, **processor.sampling_defaults}
    return RequestOptions(**(defaults | said))


@dataclasses.dataclass
class _Parts:
    """The parts of a model that an engine needs, without a reference to the model."""

    processor: Processor
    generator: Generator
    max_positions: int


class Chats:
    """One engine with one slot, whose context grows with the conversation.

    It caches picture features and prompt prefixes, so a later turn of a conversation prefills only
    its new tokens.

    Args:
        model: no reference is kept, so it may be freed while this object lives.
    """

    def __init__(self, model: Served):
        self._model = _Parts(model.processor, model.generator, model.max_positions)
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def submit(self, prompt: Prompt, options: RequestOptions) -> Request:
        """
        Raises:
            PromptTooLong: the prompt fills the model's context and leaves no token for an answer.
            UserError: see :meth:`Engine.submit`.
        """
        needed = len(prompt.input_ids) + options.max_new_tokens
        with self._lock:
            return self._for(needed).submit(prompt, options)

    def close(self) -> None:
        """Cancel running requests and free the memory."""
        with self._lock:
            if self._engine is not None:
                self._engine.close(drain=False)
            self._engine = None

    def _for(self, needed: int) -> Engine:
        most = self._model.max_positions
        context = min(most, max(_LEAST_CONTEXT, 1 << (needed - 1).bit_length()))
        if self._engine is None or self._engine.context < context:
            if self._engine is not None:
                self._engine.close()
            self._engine = Engine(self._model, slots=1, context=context)
        return self._engine
