"""InternVL: tiles from pictures, prompts from messages, a checkpoint that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert import hf_to_flax
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.models.internvl.processor import InternVLProcessor
from mquant_jax.models.internvl.tiles import Tiling
from tests.family_checks import answers
from tests.helpers import GOLDENS, fails, golden, golden_pictures
from tests.hf_folders import write_tokenizer
from tests.internvl_cases import CASES

ORDERS = {  # special tokens in the goldens' order, with the first id
    "internvl2/public": ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>"),
    "internvl/public": (
        "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<video>", "<IMG_CONTEXT>",
    ),
}  # fmt: skip
FIRST = {"internvl2/public": 374, "internvl/public": 386}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT>\n"
    "{% elif c.type == 'video' %}<video>\n{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(folder: Path, case: str, **tokenizer: str) -> Path:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        if (GOLDENS / case / name).is_file():
            shutil.copyfile(GOLDENS / case / name, folder / name)
    write_tokenizer(folder, ORDERS[case], FIRST[case], eos_token="<|im_end|>", **tokenizer)
    return folder


def processor_of(folder: Path) -> InternVLProcessor:
    config = InternVLConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return InternVLProcessor(folder, config)


@pytest.fixture(scope="module", params=ORDERS)
def processor(request, tmp_path_factory) -> InternVLProcessor:
    native = {"chat_template": TEMPLATE} if request.param == "internvl/public" else {}
    return processor_of(make_folder(tmp_path_factory.mktemp("vl"), request.param, **native))


def text_of(processor: InternVLProcessor, ids: list[int]) -> str:
    """The prompt's text, with each run of placeholders as one."""
    token = processor.image_token_id
    once = [t for i, t in enumerate(ids) if t != token or ids[i - 1] != t]
    return processor.tokenizer.decode(once)


def test_grids_of_the_published_code() -> None:
    table = json.loads((GOLDENS / "internvl2" / "preprocess_table.json").read_text())["rows"]
    assert len(table) > 100
    for row in table:
        tiling = Tiling(448, 1, row["max_num"], True)
        cols, rows = tiling.grid(row["width"], row["height"])
        assert (cols, rows) == (row["cols"], row["rows"]), row
        assert cols * rows + (cols * rows > 1) == row["tiles_with_thumbnail"]


@pytest.mark.parametrize("case", CASES)
def test_pixels_match_the_reference_bit_by_bit(case) -> None:
    inputs = golden(*case.split("/"))[1]
    most = 4 if case.startswith("internvl2") else 3
    tiling = Tiling(inputs["pixel_values"].shape[-1], 1, most, True)
    got = np.concatenate([tiling.pixels(Image.fromarray(x)) for x in golden_pictures(case)])
    np.testing.assert_array_equal(got, inputs["pixel_values"])


def test_prompts_are_cut_and_filled(processor) -> None:
    case = "internvl2/public" if processor.config.template else "internvl/public"
    inputs = golden(*case.split("/"))[1]
    tiles = inputs.get("tiles_per_image", inputs.get("num_patches")).tolist()
    prompt = processor.prompt("hi", golden_pictures(case))
    assert [grid[0] for grid in prompt.grids] == tiles
    tokens = processor.config.tile_tokens
    assert prompt.input_ids.count(processor.image_token_id) == tokens * sum(tiles)
    batch = processor.collate([prompt, processor.prompt("hello")])
    n = processor.config.tile_tokens * sum(tiles)
    np.testing.assert_array_equal(batch.visual_index[batch.token_class == 1], np.arange(n))
    assert batch.vision.valid.all(axis=1).sum() == sum(tiles)
    sides = [processor.config.patch_size * side for side in prompt.grids[0][1:]]
    assert sides == list(inputs["pixel_values"].shape[2:])


def test_the_published_template(tmp_path) -> None:
    p = processor_of(make_folder(tmp_path, "internvl2/public"))
    image = golden_pictures("internvl2/public")[1]
    text = text_of(p, p.prompt("What?", [image]).input_ids)
    system, rest = text.split("<|im_end|>", 1)
    assert system.startswith("<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的")
    picture = "<img><IMG_CONTEXT></img>"
    assert rest == f"<|im_start|>user\n{picture}\nWhat?<|im_end|><|im_start|>assistant\n"
    text = text_of(p, p.prompt("A <image>, B <image>.", [image, image]).input_ids)
    assert f"user\nA {picture}, B {picture}.<|im_end|>" in text
    clip = text_of(p, p.prompt("Go", videos=[[image, image]]).input_ids)
    assert f"user\nFrame1: {picture}\nFrame2: {picture}\nGo<|im_end|>" in clip
    assert p.stop_ids == (p.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "3"}]},
    ]
    text = text_of(p, p.messages(chat, [image]).input_ids)
    assert text.endswith(
        "user\n1<|im_end|><|im_start|>assistant\n2<|im_end|>"
        f"<|im_start|>user\n{picture}\n3<|im_end|><|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [{}, {"chat_template": TEMPLATE}])
def test_the_native_template(tmp_path, template) -> None:
    p = processor_of(make_folder(tmp_path, "internvl/public", **template))
    image = golden_pictures("internvl/public")[2]
    picture = "<img><IMG_CONTEXT></img>"
    text = text_of(p, p.prompt("What?", [image]).input_ids)
    turn = f"<|im_start|>user\n{picture}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert text == turn
    clip = text_of(p, p.prompt("Go", videos=[[image, image]]).input_ids)
    assert f"user\nFrame1: {picture}\nFrame2: {picture}\nGo<|im_end|>\n" in clip


def test_bad_input_is_named(processor, tmp_path) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    fails("1 image placeholders, but 2", lambda: processor.prompt("<image>", [image, image]))
    fails("no such file", lambda: processor.prompt("x", [tmp_path / "none.png"]))
    fails("sequence of frames", lambda: processor.prompt("x", videos=[[]]))
    fails('"role" and "content"', lambda: processor.messages([{"role": "user"}]))
    folder = make_folder(tmp_path, "internvl/public")
    write_tokenizer(folder, ("<a>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"), 380)
    fails("<IMG_CONTEXT> is token 384", lambda: processor_of(folder).prompt("x"))
    write_tokenizer(folder, ("<|im_end|>",), 386)
    fails("no token <img>", lambda: processor_of(folder).prompt("x"))


def test_a_converted_folder_answers(tmp_path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    make_folder(src, "internvl2/public")
    assert hf_to_flax.main([str(src), str(tmp_path / "dst")]) == 0
    answers(tmp_path / "dst", golden_pictures("internvl2/public")[:1], tokens=3)
