"""Response objects of ``/v1/chat/completions``, complete or streamed as events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from mquant_jax.runtime.requests import Answer

DONE = b"data: [DONE]\n\n"


class Reply:
    """The response objects of one answer, which share an id.

    Args:
        model: the model's name.
        include_usage: whether a stream ends with token counts.
    """

    def __init__(self, model: str, include_usage: bool = False):
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.model, self.include_usage = model, include_usage

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The complete answer as one object."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = _choice("message", message, answer.finish_reason)
        return self._object("chat.completion", [choice]) | {
            "usage": _usage(answer), "timings": _timings(answer),
        }  # fmt: skip

    def begin(self) -> bytes:
        """The first event."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, delta: str) -> bytes:
        """An event with more text."""
        return self._chunk({"content": delta})

    def end(self, answer: Answer) -> bytes:
        """The last events."""
        out = self._chunk({}, answer.finish_reason, {"timings": _timings(answer)})
        if self.include_usage:
            out += event(self._object("chat.completion.chunk", []) | {"usage": _usage(answer)})
        return out + DONE

    def _chunk(
        self, delta: dict[str, str], reason: str | None = None, more: Mapping[str, Any] = {}
    ) -> bytes:
        chunk = self._object("chat.completion.chunk", [_choice("delta", delta, reason)])
        return event(chunk | ({"usage": None} if self.include_usage else {}) | dict(more))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices}  # fmt: skip


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _choice(key: str, value: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, key: value, "logprobs": None, "finish_reason": reason}


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
            "total_tokens": total}  # fmt: skip


def _timings(answer: Answer) -> dict[str, float]:
    keys = ("queue_seconds", "prefill_seconds", "decode_seconds")
    return {key: round(getattr(answer, key), 6) for key in keys}
