"""CogVLM2: a picture's pixels, prompts from messages, a checkpoint that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import hf_to_flax
from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.cogvlm2.processor import CogVLM2Processor, render
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.squares import squeeze
from tests.family_checks import answers, cheap_w4a8
from tests.helpers import GOLDENS, fails, golden, golden_pictures
from tests.hf_folders import write_tokenizer

CASE = "cogvlm2/public"
TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
BOS = 368  # id in the goldens


def make_folder(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / CASE / name, folder / name)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    write_tokenizer(folder, TOKENS, BOS, bos_token=TOKENS[0], eos_token=TOKENS[1])
    return folder


def processor_of(folder: Path) -> CogVLM2Processor:
    config = CogVLM2Config.from_hf(json.loads((folder / "config.json").read_text()))
    return CogVLM2Processor(folder, config)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> CogVLM2Processor:
    return processor_of(make_folder(tmp_path_factory.mktemp("cog") / "src"))


def test_pixels_match_the_reference_bit_by_bit() -> None:
    inputs = golden(*CASE.split("/"))[1]
    for raw, pixels in zip(golden_pictures(CASE), inputs["images"], strict=True):
        np.testing.assert_array_equal(squeeze(Image.fromarray(raw), 84), pixels)


def test_a_question_as_published(processor) -> None:
    prompt = processor.prompt("What?", golden_pictures(CASE)[:1])
    n = processor.config.vision.tokens
    assert prompt.input_ids[: n + 1] == [BOS] + [VISUAL] * n
    text = processor.tokenizer.decode(prompt.input_ids[n + 1 :])
    assert text == "Question: What? Answer:"
    assert prompt.grids == [(1, 6, 6)] and prompt.patches.shape == (36, 588)
    batch = processor.collate([prompt, processor.prompt("Text alone")])
    assert batch.positions[0, 0, :14].tolist() == [0, 1, *[2] * 9, 3, 4, 5]
    assert batch.token_class[0, :13].tolist() == [0, *[1] * 10, 0, 0]
    assert processor.stop_ids == (369, 377)
    assert processor.decode([*processor.encode("yes"), 369]) == "yes"


def test_conversations(processor, tmp_path) -> None:
    chat = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": [{"type": "text", "text": "C?"}, {"type": "image"}]},
    ]
    prompt = processor.messages(chat, golden_pictures(CASE)[:1])
    n = processor.config.vision.tokens
    assert prompt.input_ids[1 : n + 1] == [VISUAL] * n  # always first
    said = "Question: A? Answer: B.\nQuestion: C? Answer:"
    assert processor.tokenizer.decode(prompt.input_ids[n + 1 :]) == said
    short = processor_of(make_folder(tmp_path / "vqa", template_version="vqa"))
    ids = short.messages(chat[:1]).input_ids
    assert short.tokenizer.decode(ids[1:]) == "Question: A? Short answer:"
    assert render(["A?", "B.", "C?"], "base") == "C?"


def test_bad_input_is_named(processor, tmp_path) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    fails("one picture per conversation, found 2", lambda: processor.prompt("x", [image, image]))
    fails("does not support videos", lambda: processor.prompt("x", videos=[[image]]))
    fails("no such file", lambda: processor.prompt("x", [tmp_path / "none.png"]))
    system = {"role": "system", "content": "x"}
    fails("message 0: role 'system', expected 'user'", lambda: processor.messages([system]))
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant")]
    fails("must end", lambda: processor.messages(turns))
    fails("must end", lambda: processor.messages([]))
    folder = make_folder(tmp_path / "src")
    write_tokenizer(folder, TOKENS, BOS)
    fails("no bos_token", lambda: processor_of(folder).prompt("x"))


@pytest.mark.slow
def test_w4a8_from_the_command_line(tmp_path, capsys) -> None:
    """Uses the bundled pictures and a cheap variant of the preset."""
    src = make_folder(tmp_path / "src")
    recipe = cheap_w4a8(tmp_path, vision={})
    args = [str(src), str(tmp_path / "dst"), "--recipe", str(recipe), "--json"]
    assert hf_to_flax.main(args) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "cogvlm2"
    answers(tmp_path / "dst", golden_pictures(CASE)[:1])
