"""MiniCPM-V: slices from pictures, prompts from messages, a checkpoint that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import hf_to_flax
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.minicpmv.processing import VISUAL, reference_prompts, unpack
from mquant_jax.models.minicpmv.processor import MARK, MiniCPMVProcessor
from mquant_jax.models.minicpmv.slices import Slicing
from tests.family_checks import answers, drawn
from tests.helpers import GOLDENS, fails, golden, golden_pictures
from tests.hf_folders import write_tokenizer
from tests.minicpmv_cases import CASES, FOLDER

# Special tokens in the goldens' order, starting at the twentieth id from the end.
TOKENS = (
    "<image>", "</image>", "<slice>", "</slice>", "<unk>", "<image_id>", "</image_id>",
    "<newline>", *(f"<digit {i}>" for i in range(10)), "<|im_start|>", "<|im_end|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def raw_images(case: str = "public") -> list[np.ndarray]:
    return golden_pictures(f"{FOLDER}/{case}")


def make_folder(folder: Path, tokens=TOKENS, first: int = 268, **settings) -> Path:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(GOLDENS / FOLDER / "public" / name, folder / name)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    write_tokenizer(folder, tokens, first, eos_token="<|im_end|>")
    return folder


def processor_of(folder: Path) -> MiniCPMVProcessor:
    config = MiniCPMVConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return MiniCPMVProcessor(folder, config)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> MiniCPMVProcessor:
    return processor_of(make_folder(tmp_path_factory.mktemp("cpm")))


def text_of(processor: MiniCPMVProcessor, ids: list[int]) -> str:
    return drawn(processor.tokenizer, ids, VISUAL, processor.config.queries)


def picture(k: int | None, *rows: int) -> str:
    number = "" if k is None else f"<image_id>{k}</image_id>"
    return number + "<image>*</image>" + "\n".join("<slice>*</slice>" * n for n in rows)


def test_sizes_of_the_published_code() -> None:
    table = json.loads((GOLDENS / FOLDER / "preprocess_table.json").read_text())["rows"]
    assert len(table) == 60
    slicing = Slicing(448, 14, 9)
    for row in table:
        whole, grid, size = slicing.plan(row["width"], row["height"])
        assert list(whole) == row["source_wh"], row
        assert (grid and list(grid)) == row["grid_cols_rows"], row
        assert (size and list(size)) == row["slice_wh"], row
        refined = [n * s for n, s in zip(grid, size, strict=True)] if grid else None
        assert refined == row["refine_wh"], row


@pytest.mark.parametrize("case", CASES)
def test_pixels_match_the_reference_bit_by_bit(case) -> None:
    inputs = golden(FOLDER, case)[1]
    slicing = Slicing(56, 14, 9)
    slices = [s for x in raw_images(case) for s in slicing.cut(Image.fromarray(x))[0]]
    assert len(slices) == len(inputs["tgt_sizes"])
    for i, one in enumerate(slices):
        patches, size = slicing.patches(one)
        assert list(size) == inputs["tgt_sizes"][i].tolist()
        np.testing.assert_array_equal(patches, unpack(inputs[f"pixel_values_{i}"]))


def test_pictures_stand_in_prompts_as_in_the_reference(processor) -> None:
    """Slices, markers and numbers; the goldens' tokenizer has special ids for digits."""
    _, inputs, _ = golden(FOLDER, "public")
    for row, images in ((0, raw_images()[:2]), (1, raw_images()[2:])):
        reference = list(reference_prompts(inputs, processor.config))[row]
        got = processor.prompt("x", images)
        assert got.grids == reference.grids
        np.testing.assert_array_equal(got.patches, reference.patches)
        text = text_of(processor, reference.input_ids)
        for i in range(10):
            text = text.replace(f"<digit {i}>", str(i))
        text = text.replace("<newline>", "\n")
        expected = text_of(processor, got.input_ids)
        start = expected.index("<image_id>")
        pictures = [p for p in expected[start : expected.rindex("\nx<")].split("\n<image_id>")]
        for part in ("<image_id>" + p.removeprefix("<image_id>") for p in pictures):
            assert part in text


def test_the_published_template(processor, tmp_path) -> None:
    first, second, third = raw_images()
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"

    def text(*args, **kwargs):
        return text_of(processor, processor.prompt(*args, **kwargs).input_ids)

    assert text("hi!") == f"{head}hi!{tail}"
    assert text("What?", [first]) == f"{head}{picture(0, 2)}\nWhat?{tail}"
    both = f"{head}{picture(0, 2)}\n{picture(1)}\nWhat?{tail}"
    assert text("What?", [first, second]) == both
    assert text(f"A {MARK}, B {MARK}.", [second, first]) == (
        f"{head}A {picture(0)}, B {picture(1, 2)}.{tail}"
    )
    tall = np.zeros((180, 60, 3), np.uint8)
    assert text("?", [tall]) == f"{head}{picture(0, 1, 1, 1)}\n?{tail}"
    assert text("Go", videos=[[tall, third]]) == (
        f"{head}{picture(None, 1, 1)}\n{picture(None)}\nGo{tail}"
    )
    assert text("it says <image>") == f"{head}it says <image>{tail}"
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "3"}, {"type": "image"}]},
    ]
    got = text_of(processor, processor.messages(chat, [second]).input_ids)
    assert got == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
        f"<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3\n{picture(0)}{tail}"
    )
    bare = processor_of(make_folder(tmp_path, use_image_id=False, max_slice_nums=1))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    got = text_of(bare, bare.prompt("?", [first]).input_ids)
    assert got == f"<|im_start|>user\n{picture(None)}\n?{tail}"


def test_zero_tokens_are_dropped_as_published(processor) -> None:
    assert processor.encode("!") == [0]
    batch = processor.collate([processor.prompt("a!b"), processor.prompt("abcd", raw_images()[:1])])
    real = batch.token_class[0] >= 0
    assert real.sum() == len(processor.prompt("a!b").input_ids) - 1
    assert processor.decode([0, *processor.encode("yes!")]) == "yes"
    assert processor.stop_ids == (287,)


def test_bad_input_is_named(processor, tmp_path) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    fails("1 image placeholders, but 2", lambda: processor.prompt(MARK, [image, image]))
    fails("no such file", lambda: processor.prompt("x", [tmp_path / "none.png"]))
    fails("sequence of frames", lambda: processor.prompt("x", videos=[[]]))
    fails('"role" and "content"', lambda: processor.messages([{"role": "user"}]))
    for word, change in (
        ("patch_size is 16", {"patch_size": 16}),
        ("image_feature_size is 64", {"image_feature_size": 64}),
        ("slice_mode", {"slice_mode": False}),
        ("no token <picture>", {"im_start": "<picture>"}),
    ):
        folder = make_folder(tmp_path, **change)
        fails(word, lambda folder=folder: processor_of(folder).prompt("x", [image]))


def test_a_converted_folder_answers(tmp_path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    make_folder(src)
    assert hf_to_flax.main([str(src), str(tmp_path / "dst")]) == 0
    answers(tmp_path / "dst", raw_images()[:2], tokens=3)
