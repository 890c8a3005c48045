"""The request body: fields that are read, ignored, or refused with an error."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.serve.errors import ApiError, refusal
from mquant_jax.serve.wire import read_request

HELLO = [{"role": "user", "content": "Hello"}]


def url(size: tuple[int, int] = (4, 3)) -> str:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def read(**fields: Any) -> Any:
    body = {"model": "m", "messages": HELLO, **fields}
    return read_request(json.dumps(body).encode(), "m", 100)


def refused(**fields: Any) -> ApiError:
    with pytest.raises((UserError, ApiError)) as info:
        read(**fields)
    return info.value if isinstance(info.value, ApiError) else refusal(info.value)


def test_options() -> None:
    asked = read(
        max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=-1, stop="x", top_k=3,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1, n=1,
    )  # fmt: skip
    assert asked.options == {
        "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 2**32 - 1, "stop": ["x"],
        "top_k": 3, "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert read().options == {} and not read().stream
    assert read(max_tokens=3, max_completion_tokens=3).options == {"max_new_tokens": 3}
    assert read(temperature=1e-9, top_p=0).options == {"temperature": 0.0, "top_p": 1e-6}
    asked = read(stream=True, stream_options={"include_usage": True})
    assert asked.stream and asked.include_usage


def test_fields_that_change_nothing() -> None:
    harmless = {
        "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto",
        "safety_identifier": "x", "logprobs": False, "tools": [], "response_format": {
            "type": "text"}, "logit_bias": {}, "modalities": ["text"], "tool_choice": "none",
        "max_tokens": None, "stop": None, "seed": None, "temperature": None, "audio": None,
    }  # fmt: skip
    assert read(**harmless).options == {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_token": 3}, "max_token"), ({"best_of": 2}, "best_of"), ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"), ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 2.5}, "temperature"), ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"seed": "x"}, "seed"), ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": 3}, "stop"), ({"stop": ["x"] * 33}, "stop"), ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        ({"messages": []}, "messages"), ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"), ({"messages": ["Hello"]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{**HELLO[0], "mood": "good"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(fields, param) -> None:
    error = refused(**fields)
    assert error.status == 400 and error.param == param, error.message
    assert error.body()["error"]["type"] == "invalid_request_error"
    assert len(error.message.splitlines()) == 1 and len(error.message) < 400


@pytest.mark.parametrize(
    "part",
    [
        "x", None, {"type": []}, {"type": {"type": "text"}}, {"type": "input_audio"},
        {"type": "image", "image": "/etc/passwd"},
        {"type": "text"}, {"type": "text", "text": 3}, {"type": "text", "text": "x", "y": 1},
        {"type": "image_url"}, {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
)  # fmt: skip
def test_parts_that_are_refused(part) -> None:
    error = refused(messages=[{"role": "user", "content": [part]}])
    assert error.status == 400 and error.param == "messages", error.message


def test_pictures_and_their_pixels() -> None:
    part = {"type": "image_url", "image_url": {"url": url(), "detail": "high"}}
    content = read(messages=[{"role": "user", "content": [part] * 8}]).messages[0]["content"]
    assert [p["image"].size for p in content] == [(4, 3)] * 8  # 96 of 100 pixels
    error = refused(messages=[{"role": "user", "content": [part] * 9}])
    assert error.code == "invalid_image" and "expected at most 4" in error.message
    part = {"type": "image_url", "image_url": {"url": url((101, 1))}}
    assert "101 pixels" in refused(messages=[{"role": "user", "content": [part]}]).message


def test_roles_and_content() -> None:
    messages = [{"role": "developer", "content": "a", "name": "x"},
                {"role": "assistant", "content": None, "type": "text"}]  # fmt: skip
    assert read(messages=messages).messages == [{"role": "system", "content": "a"},
                                                {"role": "assistant", "content": ""}]  # fmt: skip


def test_other_models_and_other_bodies() -> None:
    error = refused(model="gpt-9")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    for body in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}'):
        with pytest.raises(UserError):
            read_request(body, "m", 100)
