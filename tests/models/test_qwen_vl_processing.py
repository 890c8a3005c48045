"""Qwen-VL: square pictures, prompts from messages, a quantised checkpoint that answers."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import hf_to_flax
from mquant_jax.errors import UserError
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.qwen_vl.processing import VISUAL
from mquant_jax.models.qwen_vl.processor import MARK, QwenVLProcessor
from mquant_jax.models.squares import patchify, squeeze
from mquant_jax.samples import Sample, write_samples
from tests.family_checks import answers, drawn
from tests.helpers import GOLDENS, fails, golden, golden_pictures
from tests.hf_folders import write_tokenizer
from tests.qwen_vl_cases import CASES, changed_config

PIECES = [*(bytes([b]) for b in range(256)), b"he", b"ll", b"hell", b"hello", b" he"]
FIRST = len(PIECES)  # id of the first special token
END, START, STOP, IMG = FIRST, FIRST + 1, FIRST + 2, FIRST + 214
IMAGE = np.zeros((40, 60, 3), np.uint8)
# Special tokens in the goldens' order.
GOLDEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare>", "<other spare>", "<ref>", "</ref>",
    "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip


def make_processor(folder: Path, image_start: int = IMG, **generation) -> QwenVLProcessor:
    """A processor with a small qwen.tiktoken, and a vocabulary large enough for it."""
    lines = [base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(PIECES)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    hf = changed_config(vocab_size=FIRST + 220, visual={"image_start_id": image_start})
    return QwenVLProcessor(folder, QwenVLConfig.from_hf(hf))


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> QwenVLProcessor:
    return make_processor(tmp_path_factory.mktemp("qwen"), chat_format="chatml")


def text_of(processor: QwenVLProcessor, ids: list[int]) -> str:
    return drawn(processor.tokenizer, ids, VISUAL, processor.config.resampler.queries)


@pytest.mark.parametrize("case", CASES)
def test_pixels_match_the_reference(case) -> None:
    hf, inputs, _ = golden(*case.split("/"))
    size = hf["visual"]["image_size"]
    got = np.stack([squeeze(Image.fromarray(x), size) for x in golden_pictures(case)])
    np.testing.assert_array_equal(got, inputs["pixel_values"])


def test_ids_of_the_published_layout(processor) -> None:
    assert processor.tokenizer.get_vocab()["<|extra_204|>"] == IMG - 7
    assert processor.encode("hello hell!") == [259, 32, 258, 33]
    assert processor.encode("<ref>he</ref>") == [IMG - 6, 256, IMG - 5]
    assert processor.encode("e\u0301") == list("\u00e9".encode())  # NFC first
    assert processor.stop_ids == (STOP, START, END)
    assert processor.pad_id == END


def test_no_text_ends_its_own_turn(processor) -> None:
    ids = processor.encode("<|im_end|>")
    assert ids == list(b"<|im_end|>")
    assert processor.prompt("<|im_start|><|endoftext|>").input_ids.count(START) == 3


def test_the_published_template(processor) -> None:
    def text(*args, **kwargs):
        return text_of(processor, processor.prompt(*args, **kwargs).input_ids)

    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert text("hello!") == f"{head}hello!{tail}"
    one, two = (f"Picture {k}: <img>*</img>\n" for k in (1, 2))
    assert text("What?", [IMAGE]) == f"{head}{one}What?{tail}"
    assert text("What?", [IMAGE, IMAGE]) == f"{head}{one}{two}What?{tail}"
    published = "Picture 1: <img>assets/demo.jpeg</img>\nWhat?"
    assert text(published, [IMAGE]) == f"{head}{one}What?{tail}"
    assert text(f"A {MARK}, B {MARK}.", [IMAGE] * 2) == (
        f"{head}A <img>*</img>, B <img>*</img>.{tail}"
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1"}]},
        {"role": "assistant", "content": "2 <box>(3,4),(5,6)</box>"},
        {"role": "user", "content": [{"type": "text", "text": "3\n"}, {"type": "image"}]},
    ]
    got = processor.messages(chat, [IMAGE, IMAGE])
    assert len(got.grids) == 2 and got.patches.shape == (800, 48)
    assert text_of(processor, got.input_ids) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{one}1<|im_end|>\n"
        "<|im_start|>assistant\n2 <box>(3,4),(5,6)</box><|im_end|>\n"
        f"<|im_start|>user\n3\n{one}{tail}"
    )


def test_the_oldest_turns_make_way(tmp_path) -> None:
    """The system prompt and the last question always stay; pictures are dropped with their turn."""
    first, second, third = golden_pictures(CASES[0])
    picture = {"type": "image"}
    chat = [
        {"role": "user", "content": [picture]}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": [picture]}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": [picture, {"type": "text", "text": "x" * 200}]},
    ]  # fmt: skip
    for window, turns in ((500, 2), (120, 1), (10, 0)):
        processor = make_processor(tmp_path, max_window_size=window)
        got = processor.messages(chat, [first, second, third])
        text = text_of(processor, got.input_ids)
        assert text.startswith("<|im_start|>system") and "x" * 200 in text
        assert ("one" in text, "two" in text) == (turns > 1, turns > 0)
        kept = [first, second, third][2 - turns :]
        squares = patchify(np.stack([squeeze(Image.fromarray(x), 80) for x in kept]), 4)
        np.testing.assert_array_equal(got.patches, squares.reshape(-1, 48))
        assert len(got.grids) == turns + 1


def test_a_model_that_goes_on_with_a_text(tmp_path) -> None:
    processor = make_processor(tmp_path, chat_format="raw")
    got = processor.prompt("It shows", [IMAGE])
    assert text_of(processor, got.input_ids) == "Picture 1: <img>*</img>\nIt shows"
    assert processor.stop_ids == (END,)
    with pytest.raises(UserError, match="not a chat model"):
        processor.messages([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_answers_keep_their_boxes(processor) -> None:
    ids = processor.encode(" <ref>hello</ref><box>(1,2),(3,4)</box>\n")
    assert processor.decode([*ids, STOP, END]) == "<ref>hello</ref><box>(1,2),(3,4)</box>"


def test_bad_input_is_named(processor, tmp_path) -> None:
    fails("1 image placeholders, but 2", lambda: processor.prompt(MARK, [IMAGE, IMAGE]))
    fails("1 image placeholders, but 0", lambda: processor.prompt("<img>/etc/passwd</img>"))
    fails("no such file", lambda: processor.prompt("x", [tmp_path / "none.png"]))
    fails("no videos", lambda: processor.prompt("x", videos=[[IMAGE]]))
    for text in ("a <img> b", "a </img>", "</img> a <img>"):
        fails("message 0: <img> and </img> do not pair", lambda text=text: processor.prompt(text))
    fails('"role" and "content"', lambda: processor.messages([{"role": "user"}]))
    fails("qwen.tiktoken: no such file", lambda: QwenVLProcessor(tmp_path, processor.config))
    other = make_processor(tmp_path, image_start=400)
    fails("<img> is token 475, config.json has 400", lambda: other.encode("x"))
    odd = make_processor(tmp_path, chat_format="alpaca")
    fails("'alpaca'", lambda: odd.prompt("x"))
    (tmp_path / "qwen.tiktoken").unlink()
    write_tokenizer(tmp_path, GOLDEN_TOKENS[:-1], IMG - 11)
    fails("no token <imgpad>", lambda: QwenVLProcessor(tmp_path, processor.config).encode("x"))


@pytest.mark.slow
def test_a_quantised_folder_answers(tmp_path) -> None:
    """Convert a folder with a few samples to W4A8, then generate."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(GOLDENS / CASES[0], src, ignore=shutil.ignore_patterns("*puts.safetensors"))
    write_tokenizer(src, GOLDEN_TOKENS, 290, eos_token="<|endoftext|>")
    pictures = golden_pictures(CASES[0])
    samples = [Sample((x[:33, :64],), "What is it?", "A picture.") for x in pictures]
    write_samples(tmp_path / "few.jsonl", samples)
    args = [str(src), str(dst), "--recipe", "w4a8", "--calibration", str(tmp_path / "few.jsonl")]
    assert hf_to_flax.main(args) == 0
    answers(dst, pictures[:2])
