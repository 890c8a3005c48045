"""The adapter for lmms-eval; .ci/lmms_eval installs the package and runs these tests."""

import types
from importlib.metadata import entry_points

import numpy as np
import pytest

from tests.helpers import fails

pytest.importorskip("lmms_eval", reason="the extra lmms-eval is not installed")

from mquant_jax.adapters import lmms_eval as adapter  # noqa: E402
from mquant_jax.errors import UserError  # noqa: E402
from mquant_jax.runtime.sampling import Sampling  # noqa: E402


def test_lmms_eval_finds_the_model() -> None:
    from lmms_eval.models import get_model

    assert "mquant_jax" in {e.name for e in entry_points(group="lmms_eval.models")}
    assert get_model("mquant_jax") is adapter.MQuantJax and not adapter.MQuantJax.is_simple


def test_messages() -> None:
    picture, clip = np.zeros((2, 2, 3), np.uint8), [np.zeros((2, 2, 3), np.uint8)]
    chat = adapter.conversation([
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [
            {"type": "image", "url": picture}, {"type": "text", "text": "what?"},
            {"type": "video", "url": clip},
        ]},
    ])  # fmt: skip
    assert chat[0] == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    image, text, video = chat[1]["content"]
    assert image["type"] == "image" and image["image"] is picture
    assert text == {"type": "text", "text": "what?"}
    assert video["type"] == "video" and video["video"] is clip
    for part, words in (
        ({"type": "audio", "url": "x"}, "part of type 'audio'"),
        ({"type": "video", "url": "a.mp4"}, "video a.mp4: video files are not supported"),
    ):
        fails(words, lambda part=part: adapter.conversation([{"role": "user", "content": [part]}]))


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, Sampling()),
        ({"temperature": 0, "do_sample": False, "top_p": None, "num_beams": 1}, Sampling()),
        ({"temperature": 0.7, "do_sample": False}, Sampling()),
        ({"temperature": 0.7}, Sampling(0.7)),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5}, Sampling(1.0, 5, 0.9)),
    ],
)
def test_sampling(how, wanted) -> None:
    assert adapter._sampling(how) == wanted


def test_stop_strings_and_beams() -> None:
    assert adapter._until("a\n\nb", ["\n\n"]) == "a" and adapter._until("ab", None) == "ab"
    assert adapter._until("a;b.c", [".", ";", ""]) == "a" and adapter._until("a.b", ".") == "a"
    fails("until is", lambda: adapter._until("a", 3))
    fails("num_beams is 3", lambda: adapter._sampling({"num_beams": 3}))


def test_requests_keep_their_order_and_name_their_document() -> None:
    class Processor:
        def chat(self, chat):
            if chat[0]["content"][0]["text"] == "bad":
                raise UserError("no prompt")
            return chat[0]["content"][0]["text"]

        def decode(self, ids):
            return "".join(map(chr, ids))

    def generate(prompts, tokens, sampling):
        return types.SimpleNamespace(tokens=[list(map(ord, p[:tokens])) for p in prompts])

    model = object.__new__(adapter.MQuantJax)
    model._rank, model.task_dict = 0, {"t": {"test": ["one.1", "two.2", "three.3", "bad"]}}
    model.options = types.SimpleNamespace(batch_size=2)
    model.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)
    model.model = types.SimpleNamespace(processor=Processor(), generate_prompts=generate)

    def request(doc, **how):
        to_messages = lambda text: [{"role": "user", "content": text}]  # noqa: E731
        return types.SimpleNamespace(args=("", to_messages, how, doc, "t", "test"))

    long, short = {"until": ["."]}, {"max_new_tokens": 2}
    out = model.generate_until([request(2, **long), request(1, **short), request(0, **long)])
    assert [answer.text for answer in out] == ["three", "tw", "one"]
    fails("task t, document 3 of test: no prompt", lambda: model.generate_until([request(3)]))
    fails("a task with loglikelihood", lambda: model.loglikelihood([]))
    fails("generate_until_multi_round", lambda: model.generate_until_multi_round([]))
