"""The server over a real socket: OpenAI's client, concurrency, limits, errors, shutdown."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

import mquant_jax as mq
from mquant_jax.runtime.engine import Engine
from mquant_jax.serve.server import open_socket
from tests.helpers import fails
from tests.mquant_jax.serve.running import NAME, data_url, served

KEY = "secret"
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 255, (28 * (1 + i), 56, 3), np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def model(random_float) -> mq.Model:
    return mq.load(random_float)


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    with Engine(model, slots=4, context=512, queue=80) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(model, engine) -> Iterator[str]:
    with served(model, engine) as (url, _):
        yield url


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def user(text: str, *pictures: np.ndarray) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(x)}} for x in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request to the chat endpoint."""
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def eventually(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_whole_answer(server, model) -> None:
    client = client_of(server)
    assert [m.id for m in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]
    messages = [{"role": "system", "content": "Be brief."}, *user("What?", PICTURES[0])]
    done = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12, seed=1)
    chat = [messages[0], {"role": "user", "content": [
        {"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What?"}]}]  # fmt: skip
    assert done.choices[0].message.content == model.chat(chat, max_new_tokens=12)
    assert done.choices[0].finish_reason == "length" and done.object == "chat.completion"
    prompt = len(model.processor.chat(chat).input_ids)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt, 12)
    assert done.usage.total_tokens == prompt + 12
    assert done.timings.keys() == {"queue_seconds", "prefill_seconds", "decode_seconds"}


def test_a_stream(server) -> None:
    client = client_of(server)
    asked: dict[str, Any] = {"model": NAME, "messages": user("Why?"), "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}))  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    body = json.dumps({**asked, "stream": True}).encode()
    request = urllib.request.Request(f"{server}/v1/chat/completions", body,
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode()
    assert events.endswith("data: [DONE]\n\n") and "usage" not in events


def test_sampling_and_stops(server) -> None:
    create = client_of(server).chat.completions.create

    def text(**more: Any) -> str:
        done = create(model=NAME, messages=user("Go"), max_tokens=16, **more)
        return done.choices[0].message.content

    hot = {"temperature": 1.5, "top_p": 0.95}
    assert text(seed=5, **hot) == text(seed=5, **hot) != text(seed=6, **hot)
    whole = text()
    stop = next(c for c in whole[2:] if c != "\ufffd")
    done = create(model=NAME, messages=user("Go"), max_tokens=16, stop=[stop])
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"


def test_64_at_once(server, model) -> None:
    """Mixed requests (text and pictures, streamed or not, short and long) all get the answers that
    they get alone."""
    client = client_of(server)
    kinds = [(f"Question {i % 4}" * (1 + i % 3), PICTURES[: i % 4], 4 + 6 * (i % 3))
             for i in range(12)]  # fmt: skip

    def ask(i: int) -> str:
        text, pictures, most = kinds[i % 12]
        asked: dict[str, Any] = {
            "model": NAME, "messages": user(text, *pictures), "max_tokens": most,
        }  # fmt: skip
        if i % 2:
            return client.chat.completions.create(**asked).choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    expected = [
        model.chat(
            [{"role": "user", "content": [*({"type": "image", "image": x} for x in pictures),
                                          {"type": "text", "text": text}]}],
            max_new_tokens=most,
        )
        for text, pictures, most in kinds
    ]  # fmt: skip
    assert answers == [expected[i % 12] for i in range(64)]


def test_errors_as_the_client_knows_them(server) -> None:
    create = client_of(server).chat.completions.create
    with pytest.raises(openai.NotFoundError, match="not served here; known: tiny"):
        create(model="gpt-9", messages=user("x"))
    with pytest.raises(openai.BadRequestError, match="top_logprobs") as info:
        create(model=NAME, messages=user("x"), top_logprobs=3)
    assert info.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="context is 512") as info:
        create(model=NAME, messages=user("x" * 600))
    assert info.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="nothing is downloaded"):
        url = {"url": "http://127.0.0.1/x.png"}
        create(model=NAME, messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": url}]}])  # fmt: skip
    assert post(server, b"{")[0] == 400
    assert post(server, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    for path, status in (("/v2", 404), ("/v1/chat/completions", 405), ("/v1/models/x", 404)):
        with pytest.raises(urllib.error.HTTPError) as failed:
            get(server + path)
        assert failed.value.code == status and "message" in json.load(failed.value)["error"]


def test_what_users_type_stays_text(server, model) -> None:
    create = client_of(server).chat.completions.create
    count = [create(model=NAME, messages=user(t), max_tokens=1).usage.prompt_tokens
             for t in ("<|image_pad|>", "x" * len("<|image_pad|>"))]  # fmt: skip
    found = model.processor.encode("<|image_pad|>")
    assert len(found) == 1 and abs(count[0] - count[1]) <= 3  # merges of "<|", "im" and "|>"


def test_the_api_key(model, engine) -> None:
    with served(model, engine, key=KEY) as (url, _):
        body = json.dumps({"model": NAME, "messages": user("x"), "max_tokens": 1}).encode()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY},
                        {"Authorization": "Bearer s\u00e9"}):  # fmt: skip
            status, answer = post(url, body, **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}/metrics")
        assert client_of(url, KEY).models.list().data[0].id == NAME
        assert post(url, body, Authorization=f"Bearer {KEY}")[0] == 200
        assert json.loads(get(f"{url}/health")) == {"status": "ok"}
        assert "drop" in get(url)


def test_limits(model, engine) -> None:
    with served(
        model, engine, body_bytes=3000, pixels=2000, prompt_tokens=120, max_new_tokens=3
    ) as (url, _):  # fmt: skip

        def ask(*pictures: np.ndarray, text: str = "x") -> tuple[int, Any]:
            body = {"model": NAME, "messages": user(text, *pictures)}
            return post(url, json.dumps(body).encode())

        status, answer = ask()
        assert status == 200 and answer["usage"]["completion_tokens"] == 3
        assert ask(text="x" * 3000)[1]["error"]["code"] == "request_too_large"
        assert post(url, b" " * 3001)[0] == 413
        assert ask(text="x" * 121)[1]["error"]["code"] == "context_length_exceeded"
        grey = np.zeros((50, 50, 3), np.uint8)
        status, answer = ask(grey)
        assert status == 400 and "2500 pixels" in answer["error"]["message"]


def test_more_than_the_queue_holds(model, engine) -> None:
    with served(model, engine, requests=2) as (url, _):
        client = client_of(url)
        asked: dict[str, Any] = {"model": NAME, "messages": user("x"), "max_tokens": 400}
        streams = [client.chat.completions.create(**asked, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="try again later") as info:
            client.chat.completions.create(model=NAME, messages=user("x"))
        assert info.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()  # the client disconnects
        eventually(lambda: engine.stats().running == 0)
        eventually(lambda: 'mquant_responses_total{status="499"} 2.0' in get(f"{url}/metrics"))
        done = client.chat.completions.create(model=NAME, messages=user("x"), max_tokens=1)
        assert done.usage.completion_tokens == 1


def test_a_client_that_does_not_wait(server, engine) -> None:
    before = engine.stats().cancelled
    impatient = client_of(server).with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=NAME, messages=user("x"), max_tokens=480,
                                          seed=1)  # fmt: skip
    eventually(lambda: engine.stats().cancelled > before)
    assert engine.stats().running == 0


def test_metrics(server) -> None:
    client_of(server).chat.completions.create(model=NAME, messages=user("x"), max_tokens=2)
    page = get(f"{server}/metrics")
    for line in ("mquant_engine_running 0.0", 'mquant_responses_total{status="200"}',
                 "# TYPE mquant_engine_tokens_total counter",
                 'mquant_seconds_count{stage="prefill"}'):  # fmt: skip
        assert line in page, page


def test_an_end_that_finishes_what_is_open(model, engine) -> None:
    with served(model, engine) as (url, server):
        client = client_of(url)
        stream = client.chat.completions.create(
            model=NAME, messages=user("x"), max_tokens=200, stream=True)  # fmt: skip
        next(stream)
        server.should_exit = True
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.APIConnectionError):
            client_of(url).models.list()


def test_an_end_that_does_not_wait(model, engine) -> None:
    with served(model, engine, grace=0) as (url, server):
        stream = client_of(url).chat.completions.create(
            model=NAME, messages=user("x"), max_tokens=480, stream=True)  # fmt: skip
        next(stream)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert engine.stats().running == 0


def test_addresses_that_cannot_be_used() -> None:
    with open_socket("127.0.0.1", 0) as taken:
        fails("cannot listen there", lambda: open_socket("127.0.0.1", taken.getsockname()[1]))
    fails("--port is 70000", lambda: open_socket("127.0.0.1", 70000))
    fails("cannot listen there", lambda: open_socket("no such host", 0))
