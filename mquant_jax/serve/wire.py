"""Parse the body of a ``/v1/chat/completions`` request: every field is read or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.images import load_encoded
from mquant_jax.runtime.options import SEEDS
from mquant_jax.runtime.sampling import LEAST
from mquant_jax.schema import Field, Refused, Schema, choice, flag, inside, real, table, text, whole
from mquant_jax.serve.errors import ApiError
from mquant_jax.validate import kind, shortened, shown

_MOST_STOPS = 32
_NOT_HERE = "not supported by this server; leave it out"
_PENALTY = real(None, -2.0, 2.0, null=True)
_TOKENS = whole(None, 1, null=True)


def _anything(expected: str, kinds: type | tuple[type, ...], default: Any = None) -> Field:
    """A field of these JSON types, whose content is checked elsewhere."""

    def convert(value: Any, where: str) -> Any:
        if not isinstance(value, kinds):
            raise UserError(f"{where} {shown(value)}: expected {expected}")
        return value

    return Field(expected, convert, default, null=True)


REQUEST = Schema(
    {
        "model": text(),
        "messages": _anything("a list of messages", list),
        "max_tokens": _TOKENS,
        "max_completion_tokens": _TOKENS,
        "temperature": real(None, 0.0, 2.0, null=True),
        "top_p": real(None, 0.0, 1.0, null=True),
        "top_k": whole(None, null=True),
        "repetition_penalty": real(None, LEAST, 1 / LEAST, null=True),
        "presence_penalty": _PENALTY,
        "frequency_penalty": _PENALTY,
        "seed": whole(None, -(2**63), 2**64, null=True),
        "stop": _anything("a text or a list of texts", (str, list)),
        "stream": flag(False),
        "stream_options": table(None, null=True),
        "n": whole(1, 1, 1, null=True),
    },
    harmless=frozenset({
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    }),
    refused={
        "logprobs": Refused((False,), _NOT_HERE),
        "top_logprobs": Refused((0,), _NOT_HERE),
        "logit_bias": Refused(({},), _NOT_HERE),
        "tools": Refused(([],), _NOT_HERE),
        "tool_choice": Refused(("none", "auto"), _NOT_HERE),
        "functions": Refused(([],), _NOT_HERE),
        "function_call": Refused(("none", "auto"), _NOT_HERE),
        "response_format": Refused(({"type": "text"},), _NOT_HERE),
        "modalities": Refused((["text"],), _NOT_HERE),
        "prediction": Refused((), _NOT_HERE),
        "audio": Refused((), _NOT_HERE),
        "reasoning_effort": Refused(("none",), _NOT_HERE),
        "verbosity": Refused(("medium",), _NOT_HERE),
        "web_search_options": Refused((), _NOT_HERE),
    },
)  # fmt: skip
_STREAM = Schema({"include_usage": flag(False), "include_obfuscation": flag(False)})
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE = Schema(
    {
        "role": choice("", _ROLES),
        "content": _anything("a text or a list of parts", (str, list)),
    },
    harmless=frozenset({"name"}),
    refused={
        "type": Refused(("text",), _NOT_HERE),  # lm-eval sends it in messages
        **{key: Refused(([],), _NOT_HERE)
           for key in ("tool_calls", "function_call", "refusal", "audio", "annotations")},
    },
)  # fmt: skip
_PARTS = {
    "text": Schema({"type": text(), "text": text()}),
    "image_url": Schema({"type": text(), "image_url": table()}),
}
_URL = Schema({"url": text(), "detail": choice("auto", ("auto", "low", "high"), null=True)})
# Fields named like an option of the engine.
_SAME = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty",
         "frequency_penalty")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A parsed request.

    Attributes:
        messages: in the form of :meth:`Model.chat`, with loaded pictures.
        options: the given fields of :class:`~mquant_jax.runtime.requests.RequestOptions`.
        stream: whether to stream the answer.
        include_usage: whether a stream ends with token counts.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    stream: bool
    include_usage: bool


def read_request(body: bytes, served: str, max_pixels: int) -> ChatRequest:
    """
    Args:
        served: the model's name.
        max_pixels: total over all pictures.

    Raises:
        ApiError: the model is not served here.
        UserError: not JSON, an unknown field, or a value of the wrong type or out of range.
    """
    found = read_strictly(REQUEST, _json(body), "body")
    if found["model"] != served:
        raise ApiError(404, f"model {shown(found['model'])} is not served here; known: {served}",
                       "model_not_found", "model")  # fmt: skip
    usage = {"include_usage": False}
    if found["stream_options"] is not None:
        if not found["stream"]:
            raise UserError("body: stream_options needs stream to be true")
        usage = read_strictly(_STREAM, found["stream_options"], "body: stream_options")
    messages = _messages(found["messages"], max_pixels)
    return ChatRequest(messages, _options(found), found["stream"], usage["include_usage"])


def read_strictly(schema: Schema, data: Any, where: str) -> dict[str, Any]:
    """``schema.read``, but unknown keys are errors."""
    out = schema.read(data, where)
    if unknown := schema.unknown(data):
        raise UserError(f"{inside(where, shortened(unknown[0], 40))} is not a known field; known: "
                        f"{', '.join(schema.fields)}")  # fmt: skip
    return out


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else e
        raise UserError(f"the body is not valid JSON: {why}") from e


def _options(found: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's options. Values that mean "most likely token" become the smallest accepted."""
    out = {key: found[key] for key in _SAME}
    if out["temperature"] is not None and out["temperature"] < LEAST:
        out["temperature"] = 0.0
    if out["top_p"] is not None:
        out["top_p"] = max(out["top_p"], LEAST)
    limits = {found["max_tokens"], found["max_completion_tokens"]} - {None}
    if len(limits) > 1:
        raise UserError("body: max_tokens and max_completion_tokens differ; give one of them")
    out["max_new_tokens"] = limits.pop() if limits else None
    out["seed"] = None if found["seed"] is None else found["seed"] % SEEDS
    out["stop"] = _stops(found["stop"])
    return {key: value for key, value in out.items() if value is not None}


def _stops(value: Any) -> list[str] | None:
    stops = [value] if isinstance(value, str) else value
    if stops is not None and len(stops) > _MOST_STOPS:
        raise UserError(f"body: stop has {len(stops)} texts; expected at most {_MOST_STOPS}")
    return stops


def _messages(given: Sequence[Any] | None, max_pixels: int) -> list[dict[str, Any]]:
    if not given:
        raise UserError("body: messages: expected at least one message")
    pictures = _Pictures(max_pixels)
    out = []
    for i, message in enumerate(given):
        where = f"body: messages[{i}]"
        read = read_strictly(_MESSAGE, message, where)
        if not read["role"]:
            raise UserError(f"{where}.role is missing; expected one of {', '.join(_ROLES)}")
        content = read["content"]
        if isinstance(content, list):
            content = [pictures.part(p, f"{where}.content[{n}]") for n, p in enumerate(content)]
        out.append({"role": _ROLES[read["role"]], "content": "" if content is None else content})
    return out


class _Pictures:
    """Reads parts of messages and loads their pictures, up to a number of pixels."""

    def __init__(self, max_pixels: int):
        self.left, self.count = max_pixels, 0

    def part(self, part: Any, where: str) -> dict[str, Any]:
        name = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(name, str) or name not in _PARTS:
            found = shown(name) if isinstance(part, Mapping) else kind(part)
            raise UserError(f"{where}: expected a part of type {' or '.join(_PARTS)}, "
                            f"found {found}")  # fmt: skip
        read = read_strictly(_PARTS[name], part, where)
        if name == "text":
            return read
        url = read_strictly(_URL, read["image_url"], f"{where}.image_url")["url"]
        image = load_encoded(url, f"image {self.count}", self.left)
        self.left -= image.width * image.height
        self.count += 1
        return {"type": "image", "image": image}
