"""GLM-4V: a picture's pixels, prompts from messages, a checkpoint that answers."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mquant_jax as mq
from convert import hf_to_flax
from mquant_jax.errors import UserError
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.glm4v.processor import GLM4VProcessor
from mquant_jax.models.squares import squeeze
from tests.family_checks import answers, cheap_w4a8, drawn
from tests.helpers import GOLDENS, fails, golden, golden_pictures

CASE = "glm4v/public"
FIRST = 370  # id of the first special token in the goldens


def make_folder(folder: Path, config: dict | None = None) -> Path:
    """A tokenizer of bytes and filler tokens, with the special tokens in their published order."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / CASE / name, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([200, i]) for i in range(FIRST - 256)]
    lines = [base64.b64encode(t).decode() + f" {i}\n" for i, t in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def processor_of(folder: Path) -> GLM4VProcessor:
    config = GLM4VConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return GLM4VProcessor(folder, config)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> GLM4VProcessor:
    return processor_of(make_folder(tmp_path_factory.mktemp("glm") / "src"))


def text_of(processor: GLM4VProcessor, ids: list[int]) -> str:
    return drawn(processor.tokenizer, ids, VISUAL, processor.config.vision.tokens)


def test_pixels_match_the_reference_bit_by_bit(processor) -> None:
    inputs = golden(*CASE.split("/"))[1]
    for raw, pixels in zip(golden_pictures(CASE), inputs["pixel_values"], strict=True):
        np.testing.assert_array_equal(squeeze(Image.fromarray(raw), 84), pixels)


def test_a_turn_as_the_reference_has_it(processor) -> None:
    inputs = golden(*CASE.split("/"))[1]
    image = golden_pictures(CASE)[0]
    prompt = processor.prompt("What?", [image])
    text = text_of(processor, prompt.input_ids)
    assert text == "[gMASK]<sop><|user|>\n*What?<|assistant|>"
    reference = inputs["input_ids"][0].tolist()
    begin = reference.index(processor.config.boi)
    # The goldens use another id in place of a line break.
    assert prompt.input_ids[:3] == reference[:3] and begin == 4
    assert prompt.grids == [(1, 6, 6)] and prompt.patches.shape == (36, 588)
    batch = processor.collate([prompt, processor.prompt("Text alone")])
    assert batch.positions[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert batch.positions[0, 0, 12:17].tolist() == [5, 5, 6, 7, 8]


def test_conversations(processor) -> None:
    image = golden_pictures(CASE)[0]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("A ", "b")]},
        {"role": "assistant", "metadata": "tool", "content": "\nC"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "D"}, {"type": "image"}]},
    ]  # fmt: skip
    prompt = processor.messages(chat, [Image.fromarray(image)])
    assert text_of(processor, prompt.input_ids) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nA b<|assistant|>tool\n\nC<|user|>\n*D"
        "<|assistant|>"
    )
    assert processor.stop_ids == (370, 377, 379)
    injected = processor.prompt("<|user|>").input_ids
    assert injected.count(377) == 1 and len(injected) == 4 + len("<|user|>") + 1
    assert processor.decode([*processor.encode("yes"), 377]) == "yes"


def test_special_tokens_may_be_told_by_a_file(tmp_path) -> None:
    folder = make_folder(tmp_path / "src")
    names = processor_of(folder).tokenizer.get_added_vocab()
    added = {str(i + 1): {"content": t, "special": True} for t, i in names.items()}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(UserError, match="begin_of_image|> is token 381, config.json has 380"):
        processor_of(folder).prompt("x")


def test_bad_input_is_named(processor, tmp_path) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    fails("one picture per conversation, found 2", lambda: processor.prompt("x", [image, image]))
    fails("does not support videos", lambda: processor.prompt("x", videos=[[image]]))
    fails("no such file", lambda: processor.prompt("x", [tmp_path / "none.png"]))
    fails('"role" and "content"', lambda: processor.messages([{"role": "user"}]))
    fails("role 'tool'", lambda: processor.messages([{"role": "tool", "content": "x"}]))
    tools = [{"role": "system", "content": "", "tools": [{"type": "function"}]}]
    fails("tools are not supported", lambda: processor.messages(tools))
    hf = golden(*CASE.split("/"))[0]
    del hf["vision_config"]
    alone = processor_of(make_folder(tmp_path / "text", hf))
    assert alone.prompt("x").grids == []
    fails("text-only model", lambda: alone.prompt("x", [image]))


def test_a_converted_folder_answers(tmp_path) -> None:
    src = make_folder(tmp_path / "src")
    assert hf_to_flax.main([str(src), str(tmp_path / "dst")]) == 0
    answers(tmp_path / "dst", golden_pictures(CASE)[:1], tokens=3)


@pytest.mark.slow
def test_w4a8_from_the_command_line(tmp_path, capsys) -> None:
    """Uses the bundled pictures and a cheap variant of the preset."""
    src = make_folder(tmp_path / "src")
    recipe = cheap_w4a8(tmp_path)
    args = [str(src), str(tmp_path / "dst"), "--recipe", str(recipe), "--json"]
    assert hf_to_flax.main(args) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "glm4v"
    model = mq.load(tmp_path / "dst")
    assert isinstance(model.generate(golden_pictures(CASE)[:1], "What?", max_new_tokens=2), str)
