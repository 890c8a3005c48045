"""``Model.chat`` and the command ``chat``."""

from __future__ import annotations

import gc
import io
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mquant_jax as mq
from mquant_jax import cli
from mquant_jax.runtime.chats import chat_options
from tests.helpers import fails

PICTURE = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
QUESTION = [{"role": "user", "content": [{"type": "image", "image": PICTURE},
                                         {"type": "text", "text": "What?"}]}]  # fmt: skip


@pytest.fixture(scope="module")
def place(random_float) -> Path:
    return random_float


@pytest.fixture(scope="module")
def model(place) -> mq.Model:
    return mq.load(place)


def test_an_answer_is_that_of_generate(model) -> None:
    pieces: list[str] = []
    answer = model.chat(QUESTION, max_new_tokens=10, stream=pieces.append)
    assert answer == model.generate([PICTURE], "What?", max_new_tokens=10) == "".join(pieces)
    assert len(pieces) > 1


def test_a_second_turn(model) -> None:
    first = model.chat(QUESTION, max_new_tokens=6)
    chat = [*QUESTION, {"role": "assistant", "content": first},
            {"role": "user", "content": "And?"}]  # fmt: skip
    assert model.chat(chat, max_new_tokens=6)
    assert model.chat(chat, max_new_tokens=6, stop=["\ufffd"]) is not None


def test_options(model, tmp_path) -> None:
    def drawn(seed: int) -> str:
        return model.chat(QUESTION, max_new_tokens=10, temperature=1.5, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)
    fails("unknown option 'max_tokens'; known: max_new_tokens", lambda: model.chat(
        QUESTION, max_tokens=3))  # fmt: skip
    fails("temperature is -1", lambda: model.chat(QUESTION, temperature=-1))
    fails("stream: expected a function", lambda: model.chat(QUESTION, stream=True))
    fails("context is 32768", lambda: model.chat([{"role": "user", "content": "x" * 32768}]))
    said = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **said}))
    processor = type(model.processor)(model.processor.folder, model.config)
    processor.folder = tmp_path
    options = chat_options(processor, {"top_k": 3, "top_p": None})
    assert options.max_new_tokens == 512 and options.top_k == 3
    assert (options.temperature, options.top_p, options.repetition_penalty) == (0.7, 0.8, 1.05)


def test_a_context_that_grows(model) -> None:
    long = [{"role": "user", "content": "x" * 2500}]
    assert model.chat(long, max_new_tokens=2) == model.generate((), "x" * 2500, max_new_tokens=2)


def test_several_threads(model) -> None:
    expected = [model.chat(QUESTION, max_new_tokens=n) for n in (3, 5)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: model.chat(QUESTION, max_new_tokens=3 + 2 * (i % 2)),
                            range(8)))  # fmt: skip
    assert got == expected * 4


def test_a_model_says_what_it_is_and_goes_when_it_is_not_needed(place) -> None:
    model = mq.load(place)
    assert repr(model) == "Model(qwen2_vl, recipe 'float', context of 32768 tokens)"
    assert model.chat(QUESTION, max_new_tokens=1)
    engines = [t for t in threading.enumerate() if t.name == "mquant-engine"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert sum(t.is_alive() for t in engines) < len(engines)


def test_results_say_what_they_are(model) -> None:
    asked = chat_options(model.processor, {"max_new_tokens": 2})
    prompt = model.processor.chat(QUESTION)
    said = repr(model.chats.submit(prompt, asked).result())
    assert said.startswith("Answer(text=") and "finish_reason='length'" in said
    assert "tokens=[" not in said and "prefill_seconds=" in said
    said = repr(model.generate_prompts([prompt], 2))
    assert said.startswith("Generation(stopped=[False]") and len(said) < 200


def told(place, monkeypatch, capsys, lines: str, *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command with piped input."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = cli.main(["chat", str(place), "--max-new-tokens", "5", *args])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(place, model, monkeypatch, capsys, tmp_path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "x.png")
    expected = [model.chat(QUESTION, max_new_tokens=5),
                model.chat([{"role": "user", "content": "Why?"}], max_new_tokens=5)]  # fmt: skip
    image = str(tmp_path / "x.png")
    status, out, err = told(place, monkeypatch, capsys, "What?\n\n/reset\nWhy?\n", "--image", image)
    assert (status, err) == (0, "") and out == "\n".join([*expected, ""])
    lines = f"/image {image}\nWhat?\n/exit\nnever asked\n"
    assert told(place, monkeypatch, capsys, lines)[:2] == (0, f"{expected[0]}\n")
    system = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Why?"}]
    status, out, _ = told(place, monkeypatch, capsys, "Why?", "--system", "Rhyme.")
    assert (status, out) == (0, model.chat(system, max_new_tokens=5) + "\n")


def test_the_command_goes_on_after_errors(place, model, monkeypatch, capsys) -> None:
    lines = "/image none.png\n/picture x\nWhy?\n"
    status, out, err = told(place, monkeypatch, capsys, lines)
    assert status == 1 and err.count("error: ") == 2
    assert "no such file" in err and "/picture; known: /image" in err
    assert out == model.chat([{"role": "user", "content": "Why?"}], max_new_tokens=5) + "\n"
    for args, word in ((("--image", "none.png"), "no such file"), (("--top-p", "3"), "top_p")):
        status, out, err = told(place, monkeypatch, capsys, "Why?\n", *args)
        assert status == 2 and word in err
