"""LLaVA: squares from pictures, prompts from messages, a checkpoint that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert import hf_to_flax
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.llava.processor import LlavaProcessor
from tests.family_cases import changed_config
from tests.family_checks import answers, cheap_w4a8, drawn
from tests.helpers import GOLDENS, fails, golden, golden_pictures
from tests.hf_folders import write_tokenizer
from tests.llava_cases import CLIP, DINOV2, GOLDEN_CASES, SIGLIP

SPECIAL = ("<s>", "</s>", "<image>")  # the placeholder has id 391, as in the goldens
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}"
    "[<image>]{% else %}{{ c.text }}{% endif %}{% endfor %};{% endfor %}answer:"
)
# A language model's template: contents are plain text.
TEXTS = "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


def make_folder(folder: Path, case: str = CLIP, files: Any = (), **tokenizer: str) -> Path:
    """A golden's model with a tokenizer; ``files`` replace JSON files, ``None`` removes one."""
    for path in (GOLDENS / case).iterdir():
        if path.suffix == ".json" or path.name == "model.safetensors":
            shutil.copyfile(path, folder / path.name)
    write_tokenizer(folder, SPECIAL, 389, bos_token="<s>", eos_token="</s>", **tokenizer)
    for name, content in dict(files).items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def processor_of(folder: Path) -> LlavaProcessor:
    config = LlavaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return LlavaProcessor(folder, config)


def text_of(p: LlavaProcessor, prompt: Any) -> str:
    return drawn(p.tokenizer, prompt.input_ids, p.config.image_token_id, p.config.image_tokens)


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize("saved", ["published", "whole"])
def test_pixels_match_the_reference_bit_by_bit(case, saved, tmp_path) -> None:
    settings = json.loads((GOLDENS / case / "preprocessor_config.json").read_text())
    files = {}
    if saved == "whole":  # as saved by transformers 5
        settings["image_processor_type"] += "Fast"
        files = {"preprocessor_config.json": None,
                 "processor_config.json": {"image_processor": settings}}  # fmt: skip
    p = processor_of(make_folder(tmp_path, case, files))
    for picture, expected in zip(
        golden_pictures(case), golden(*case.split("/"))[1]["pixel_values"], strict=True
    ):
        got = p.pictures.pixels(Image.fromarray(picture), "x")
        np.testing.assert_array_equal(got, expected)


def by_hand(image: Image.Image, size: tuple[int, int], mean, std) -> np.ndarray:
    x = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64) / 255
    return ((x - mean) / std).transpose(2, 0, 1)


def test_siglip_squeezes_and_older_files_give_numbers(tmp_path) -> None:
    image = Image.fromarray(golden_pictures(CLIP)[0])
    hf = changed_config(CLIP, **SIGLIP)
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56},
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}  # fmt: skip
    squeezed = by_hand(image, (56, 56), 0.5, 0.5)
    for given in (settings, {}):  # the tower's size is the default
        files = {"config.json": hf, "preprocessor_config.json": given}
        got = processor_of(make_folder(tmp_path, CLIP, files)).pictures.pixels(image, "x")
        np.testing.assert_allclose(got, squeezed, atol=1e-5)
    files = {"preprocessor_config.json": {"size": 56, "crop_size": 56}}
    got = processor_of(make_folder(tmp_path, CLIP, files)).pictures.pixels(image, "x")
    np.testing.assert_allclose(got, golden(*CLIP.split("/"))[1]["pixel_values"][0], atol=1e-6)


def test_padding_to_a_square_first(tmp_path) -> None:
    mean, std = [0.5, 0.25, 0.75], [0.5, 0.5, 0.5]
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": mean,
                "image_std": std, "size": {"shortest_edge": 56},
                "crop_size": {"height": 56, "width": 56}}  # fmt: skip
    p = processor_of(make_folder(tmp_path, CLIP, {"preprocessor_config.json": settings}))
    picture = np.full((40, 57, 3), 200, np.uint8)
    padded = Image.new("RGB", (57, 57), tuple(int(255 * x) for x in mean))
    padded.paste(Image.fromarray(picture), (0, (57 - 40) // 2))
    expected = by_hand(padded, (56, 56), mean, std)
    np.testing.assert_allclose(
        p.pictures.pixels(Image.fromarray(picture), "x"), expected, atol=1e-5
    )


def test_the_published_template(tmp_path) -> None:
    p = processor_of(make_folder(tmp_path))
    image = golden_pictures(CLIP)[0]
    assert text_of(p, p.prompt("What?", [image])) == "USER: *\nWhat? ASSISTANT:"
    assert text_of(p, p.prompt("Hello")) == "USER: Hello ASSISTANT:"
    two = p.prompt("A <image>B <image>C", [image, image])
    assert text_of(p, two) == "USER: A *\nB *\nC ASSISTANT:" and len(two.grids) == 2
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "3"}]},
    ]
    text = text_of(p, p.messages(chat, [image]))
    assert text == "Be kind. USER: 1 ASSISTANT: 2 USER: *\n3 ASSISTANT:"
    assert p.stop_ids == (p.tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(PARTS, "user:[*]What?;answer:"), (TEXTS, "<s><user>*\nWhat?<answer>")],
)
def test_the_folder_s_template(template, expected, tmp_path) -> None:
    """The folder's template may be multimodal or text-only."""
    p = processor_of(make_folder(tmp_path, DINOV2, chat_template=template))
    assert text_of(p, p.prompt("What?", golden_pictures(DINOV2)[:1])) == expected
    assert "Hello" in text_of(p, p.prompt("Hello"))


def test_what_begins_a_text_stands_there_once(tmp_path) -> None:
    from tokenizers import Tokenizer, processors

    for template, begin in ((None, "<s>USER"), (TEXTS, "<s><user>")):
        config = {} if template is None else {"chat_template": template}
        folder = make_folder(tmp_path, **config)
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        raw.post_processor = processors.TemplateProcessing("<s> $A", "$A $B", [("<s>", 389)])
        raw.save(str(folder / "tokenizer.json"))
        p = processor_of(folder)
        text = p.tokenizer.decode(p.prompt("x").input_ids)
        assert text.startswith(begin) and text.count("<s>") == 1


def test_another_name_for_the_placeholder(tmp_path) -> None:
    files = {"processor_config.json": {"image_token": "<pic>"}}
    folder = make_folder(tmp_path, CLIP, files)
    fails("has no token '<pic>'; config.json has 391", lambda: processor_of(folder).tokenizer)
    write_tokenizer(folder, ("<s>", "</s>", "<pic>"), 389, bos_token="<s>", eos_token="</s>")
    p = processor_of(folder)
    assert text_of(p, p.prompt("<image>What?", golden_pictures(CLIP)[:1])).startswith("USER: *\n")
    write_tokenizer(folder, ("<s>", "<pic>"), 389, bos_token="<s>")
    fails("has token 390 for '<pic>'", lambda: processor_of(folder).tokenizer)
    (folder / "processor_config.json").write_text('{"image_token": 3}')
    fails("image_token 3: expected a text", lambda: processor_of(folder).tokenizer)


def test_bad_input_is_named(tmp_path) -> None:
    p = processor_of(make_folder(tmp_path))
    image = np.zeros((40, 40, 3), np.uint8)
    fails("1 image placeholders, but 2", lambda: p.prompt("<image>", [image, image]))
    fails("0 image placeholders, but 1", lambda: p.messages([{"role": "user", "content": "x"}],
                                                            [image]))  # fmt: skip
    fails("videos are not supported", lambda: p.prompt("x", videos=[[image]]))
    fails("no such file", lambda: p.prompt("x", [tmp_path / "none.png"]))
    thin = np.zeros((1, 60_000, 3), np.uint8)
    fails("image 0: 60000 x 1 pixels would be resized to", lambda: p.prompt("x", [thin]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported"),
        ({"image_processor_type": 3}, "image_processor_type 3"),
        ({"size": {"height": 56}}, "size .*expected shortest_edge or height and width"),
        ({"size": "56"}, "size '56': expected a whole number"),
        ({"crop_size": {"shortest_edge": 56}}, "crop_size .*expected height and width"),
        (
            {"crop_size": {"height": 42, "width": 42}},
            "resizes x to 42 x 42 pixels; config.*56",
        ),
        ({"do_center_crop": False}, "resizes x to 80 x 56 pixels"),
        ({"image_std": [0, 0, 0]}, "image_std"),
    ],
)
def test_settings_of_another_model_are_refused(settings, words, tmp_path) -> None:
    known = json.loads((GOLDENS / CLIP / "preprocessor_config.json").read_text())
    p = processor_of(make_folder(tmp_path, CLIP, {"preprocessor_config.json": known | settings}))
    fails(words, lambda: p.pictures.pixels(Image.new("RGB", (100, 70)), "x"))


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_a_converted_folder_answers(case, tmp_path) -> None:
    (src := tmp_path / "src").mkdir()
    make_folder(src, case)
    dst = tmp_path / "dst"
    args = [str(src), str(dst), "--recipe", str(cheap_w4a8(tmp_path))]
    assert hf_to_flax.main(args) == 0
    answers(dst, golden_pictures(case)[:2])
