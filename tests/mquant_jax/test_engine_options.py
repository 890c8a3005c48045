"""Invalid options of the engine and of requests are refused by name."""

import pytest

import mquant_jax as mq
from tests.helpers import fails


@pytest.fixture(scope="module")
def model(demo_float):
    return mq.load(demo_float)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"queue": True}, "queue is True"),
        ({"context": 1 << 20}, "context is 1048576; expected .* 2 to 2048"),
        ({"reuse_bytes": -1}, "reuse_bytes is -1"),
        ({"prefill_chunk": 100}, "prefill_chunk is 100; expected a multiple of 64"),
    ],
)
def test_bad_engine_options(model, options, words) -> None:
    fails(words, lambda: mq.Engine(model, **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
        ({"stop": 3}, "stop: expected a text or a list of texts, found int"),
        ({"stop": ["a", ""]}, "stop 1 is empty"),
        ({"stop": ["a", 7]}, "stop 1: expected text, found int"),
    ],
)
def test_bad_request_options(options, words) -> None:
    fails(words, lambda: mq.RequestOptions(**options))
