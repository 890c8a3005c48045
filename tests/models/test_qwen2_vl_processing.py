"""Pictures to patches, chats to tokens, tokens to positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processing import (
    mrope_positions,
    pack_vision,
    patch_coords,
    reference_batch,
    reference_prompts,
)
from mquant_jax.models.qwen2_vl.processor import Qwen2VLProcessor, load_image
from mquant_jax.models.qwen2_vl.weights import weight_rules
from tests.helpers import GOLDENS, golden
from tests.hf_folders import write_tokenizer

CASE = GOLDENS / "qwen2_vl" / "public"
CONFIG = Qwen2VLConfig.from_hf(golden("qwen2_vl", "public")[0])
SPECIAL = (
    "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|unused|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(CASE / name, folder / name)
    eos = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_tokenizer(folder, SPECIAL, first=384, **eos)
    return folder


@pytest.fixture(scope="module")
def processor(folder) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(folder, CONFIG)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    inputs = golden("qwen2_vl", "public")[1]
    return [inputs[f"image_{i}"] for i in range(3)]


def text_of(processor: Qwen2VLProcessor, ids: list[int]) -> str:
    """The prompt's text, with each run of placeholders as one."""
    once = [t for i, t in enumerate(ids) if t not in (IMAGE, VIDEO) or ids[i - 1] != t]
    return processor.tokenizer.decode(once)


def test_image_patches_match_the_reference(processor, images) -> None:
    inputs = golden("qwen2_vl", "public")[1]
    prompt = processor.prompt("hi", images)
    np.testing.assert_allclose(prompt.patches, inputs["pixel_values"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(prompt.grids, inputs["image_grid_thw"])
    assert prompt.input_ids.count(IMAGE) == 18


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_video_patches_match_the_reference(processor, order) -> None:
    inputs = golden("qwen2_vl", "public_video")[1]
    parts = np.split(inputs["pixel_values_videos"], [72])
    prompt = processor.prompt("hi", videos=[inputs[f"video_frames_{i}"] for i in order])
    expected = np.concatenate([parts[i] for i in order])
    np.testing.assert_allclose(prompt.patches, expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(prompt.grids, inputs["video_grid_thw"][list(order)])
    assert prompt.input_ids.count(VIDEO) == 30


def test_an_odd_clip_repeats_its_last_frame(processor) -> None:
    frames = golden("qwen2_vl", "public_video")[1]["video_frames_0"][:5]
    odd = processor.prompt("", videos=[frames])
    even = processor.prompt("", videos=[np.concatenate([frames, frames[-1:]])])
    assert odd.grids == even.grids == [(3, 4, 6)]
    np.testing.assert_array_equal(odd.patches, even.patches)


def test_a_still_is_a_clip_of_two_equal_frames(processor, images) -> None:
    still = processor.prompt("", images[:1])
    clip = processor.prompt("", videos=[[images[0], images[0]]])
    np.testing.assert_array_equal(still.patches, clip.patches)
    assert still.grids == clip.grids


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((42, 42), (1, 4, 4)),  # 1.5 blocks: round half to even gives 2
        ((70, 70), (1, 4, 4)),  # 2.5 blocks: round half to even gives 2
        ((98, 70), (1, 8, 4)),  # 3.5 -> 4, 2.5 -> 2
        ((1, 5), (1, 2, 10)),  # rounds to 0, then grows to min_pixels
    ],
)
def test_sizes_round_half_to_even(processor, size, grid) -> None:
    image = np.zeros((*size, 3), np.uint8)
    assert processor.prompt("", [image]).grids == [grid]


def test_pictures_come_in_many_forms(processor, images, tmp_path) -> None:
    path = tmp_path / "picture.png"
    picture = Image.fromarray(images[0])
    picture.save(path)
    expected = processor.prompt("", images[:1]).patches
    for form in (picture, picture.convert("RGBA"), path, str(path)):
        np.testing.assert_array_equal(processor.prompt("", [form]).patches, expected)


def test_the_published_template(processor, images) -> None:
    prompt = processor.prompt("What?", images[:1])
    assert text_of(processor, prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer"])
def test_the_folders_own_template(copied, images, where) -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}[<|image_pad|>]"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    if where == "chat_template.jinja":
        (copied / where).write_text(template)
    elif where == "chat_template.json":
        (copied / where).write_text(json.dumps({"chat_template": template}))
    else:
        path = copied / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    processor = Qwen2VLProcessor(copied, CONFIG)
    prompt = processor.prompt("a<|image_pad|>b", images[:1])
    assert text_of(processor, prompt.input_ids) == "a[<|image_pad|>]b>"


@pytest.mark.parametrize("wrapped", [False, True])
def test_placeholders_say_where_pictures_stand(processor, images, wrapped) -> None:
    full = "<|vision_start|><|image_pad|><|vision_end|>"
    place = full if wrapped else "<|image_pad|>"
    prompt = processor.prompt(f"A {place} and {place}.", images[:2])
    assert f"user\nA {full} and {full}.<|im_end|>" in text_of(processor, prompt.input_ids)
    assert prompt.grids == [(1, 4, 6), (1, 6, 4)]


def test_images_and_videos_in_the_order_of_the_text(processor, images) -> None:
    frames = golden("qwen2_vl", "public_video")[1]["video_frames_0"]
    prompt = processor.prompt("<|video_pad|>, <|image_pad|>", images[1:2], [frames])
    assert prompt.grids == [(3, 4, 6), (1, 6, 4)]
    mrope_positions(prompt.input_ids, prompt.grids, CONFIG)


def test_a_conversation(processor, images) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And <|image_pad|>?"},
    ]
    prompt = processor.messages(chat, images[:2])
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text_of(processor, prompt.input_ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>user\n{picture}What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nAnd {picture}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.grids == [(1, 4, 6), (1, 6, 4)]


@pytest.mark.parametrize(("places", "given"), [(1, 2), (2, 1), (1, 0)])
def test_placeholders_and_pictures_must_agree(processor, images, places, given) -> None:
    with pytest.raises(UserError, match=f"{places} image placeholders, but {given} images"):
        processor.prompt("<|image_pad|> " * places, images[:given])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "sound"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0"),
    ],
)
def test_malformed_messages(processor, chat, message) -> None:
    with pytest.raises(UserError, match=message):
        processor.messages(chat)


def test_pictures_that_cannot_be_read(processor, tmp_path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for bad, message in (
        (text, "notes.txt"),
        (tmp_path / "absent.png", "absent.png"),
        (np.full((4, 4, 3), 1.5, np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), "uint8"),
        (3, "int"),
    ):
        with pytest.raises(UserError, match=message):
            load_image(bad, "image 0")
    with pytest.raises(UserError, match="aspect ratio"):
        processor.prompt("", [np.zeros((1, 300, 3), np.uint8)])


def test_clips_that_cannot_be_read(processor) -> None:
    frames = [np.zeros((28, 28, 3), np.uint8), np.zeros((28, 56, 3), np.uint8)]
    for bad, message in (([], "at least one"), ("clip.mp4", "sequence"), (frames, "differ")):
        with pytest.raises(UserError, match=message):
            processor.prompt("", videos=[bad])


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_and_broken_files(copied, name) -> None:
    (copied / name).write_text("{")
    with pytest.raises(UserError, match=name):
        Qwen2VLProcessor(copied, CONFIG).prompt("", [np.zeros((28, 28, 3), np.uint8)])
    (copied / name).unlink()
    with pytest.raises(UserError, match=name):
        Qwen2VLProcessor(copied, CONFIG)


def test_stop_ids(copied, processor) -> None:
    assert processor.stop_ids == (385,)  # config.json
    for eos, expected in ((7, (7,)), ([7, 385], (7, 385))):
        (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert Qwen2VLProcessor(copied, CONFIG).stop_ids == expected
    (copied / "generation_config.json").unlink()
    (copied / "config.json").unlink()
    assert Qwen2VLProcessor(copied, CONFIG).stop_ids == (385,)  # the tokenizer's <|im_end|>


def test_decode_drops_special_tokens(processor) -> None:
    ids = processor.encode("A cat. é<|im_end|>")
    assert processor.decode(np.asarray(ids)) == "A cat. é"


def test_collate_pads_on_the_left(processor, images) -> None:
    prompts = [processor.prompt("long text", images[:1]), processor.prompt("x")]
    batch = processor.collate(prompts, pad_to=96)
    assert batch.input_ids.shape == (2, 96)
    for row, prompt in enumerate(prompts):
        n = len(prompt.input_ids)
        assert batch.input_ids[row, -n:].tolist() == prompt.input_ids
        assert (batch.input_ids[row, :-n] == 384).all() and (batch.order[row, :-n] == -1).all()
    assert (batch.token_class == 1).sum() == 6


@pytest.mark.parametrize("case", ["public", "public_video"])
def test_positions_match_the_reference(case) -> None:
    _, inputs, outputs = golden("qwen2_vl", case)
    batch, real = reference_batch(CONFIG, inputs), inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.positions[:, real], outputs["position_ids"][:, real])
    np.testing.assert_array_equal(batch.token_class == 1, outputs["is_visual"] == 1)
    lengths = inputs["attention_mask"].sum(1)
    np.testing.assert_array_equal(batch.lengths, lengths)
    np.testing.assert_array_equal(batch.next_position, lengths + outputs["rope_deltas"][:, 0])


def test_text_follows_the_longest_axis_of_a_long_clip() -> None:
    ids = [1, *[VIDEO] * 5, 2]
    positions, owner = mrope_positions(ids, [(5, 2, 2)], CONFIG)
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(positions[1], [0, 1, 1, 1, 1, 1, 6])
    np.testing.assert_array_equal(owner, [-1, 0, 0, 0, 0, 0, -1])


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([1, IMAGE], []),
        ([1], [(1, 2, 2)]),
        ([IMAGE, 1, IMAGE], [(1, 2, 4)]),
        ([IMAGE], [(2, 2, 2)]),
    ],
)
def test_positions_refuse_a_mismatch(ids, grids) -> None:
    with pytest.raises(ValueError, match="picture"):
        mrope_positions(ids, grids, CONFIG)


def test_patches_are_packed_in_merge_blocks() -> None:
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    np.testing.assert_array_equal(patch_coords(2, 4, 2), expected)
    patches = np.arange(12, dtype=np.float32)[:, None]
    vision = pack_vision(patches, [(2, 2, 2), (1, 2, 2)], 2)
    assert vision.valid.sum() == 12 and vision.patches.shape[1] % 4 == 0
    np.testing.assert_array_equal(vision.patches[1, :4, 0], [4, 5, 6, 7])


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_needs_no_tensor(tied) -> None:
    hf = {**golden("qwen2_vl", "public")[0], "tie_word_embeddings": tied}
    config = Qwen2VLConfig.from_hf(hf)
    assert config.language.tied_head is tied
    assert ("lm_head.weight" in {rule.src for rule in weight_rules(config)}) is not tied


def test_reference_prompts_are_unpadded() -> None:
    _, inputs, _ = golden("qwen2_vl", "public")
    prompts = list(reference_prompts(inputs, CONFIG))
    assert [len(p.input_ids) for p in prompts] == inputs["attention_mask"].sum(1).tolist()
    assert sum(len(p.grids) for p in prompts) == 3
