"""Qwen2.5-VL's pictures, prompts and temporal positions; the rest is shared with Qwen2-VL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mquant_jax as mq
from mquant_jax.errors import PromptError, UserError
from mquant_jax.models.base import Prompt
from mquant_jax.models.qwen2_5_vl import FAMILY
from mquant_jax.models.qwen2_vl.processing import mrope_positions, reference_prompts
from tests.family_checks import answers, cheap_w4a8
from tests.helpers import GOLDENS, golden
from tests.hf_folders import write_tokenizer
from tests.models.test_qwen2_vl_processing import SPECIAL, text_of

HF, INPUTS, _ = golden("qwen2_5_vl", "public")
CONFIG = FAMILY.config_from_hf(HF)
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(GOLDENS / "qwen2_5_vl" / "public" / name, tmp_path / name)
    write_tokenizer(tmp_path, SPECIAL, 384, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return tmp_path


def test_pictures_and_prompt_match_the_reference(folder) -> None:
    processor = FAMILY.processor(folder, CONFIG)
    prompt = processor.prompt("What?", [INPUTS[f"image_{i}"] for i in range(3)])
    np.testing.assert_allclose(prompt.patches, INPUTS["pixel_values"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(prompt.grids, INPUTS["image_grid_thw"])
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text_of(processor, prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{3 * picture}What?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("fps", "step"), [(None, 2), (2.0, 2), (1, 4), (4.0, 1), (3.0, 4 / 3)])
def test_positions_follow_the_frame_rate_of_the_folder(folder, fps, step) -> None:
    if fps is not None:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        path = folder / "video_preprocessor_config.json"
        path.write_text(json.dumps(settings | {"fps": fps}))
    processor = FAMILY.processor(folder, CONFIG)
    prompt = processor.prompt("Go on", [INPUTS["image_0"]], [FRAMES])
    assert prompt.grids[1] == (3, 4, 6) and prompt.seconds[1] == pytest.approx(2 / (fps or 2))
    batch = processor.collate([processor.continued(prompt, "On")])
    times = batch.positions[0, 0, batch.input_ids[0] == VIDEO]
    expected = np.repeat(np.floor(np.arange(3) * step), 6)
    np.testing.assert_array_equal(times - times[0], expected)


@pytest.mark.slow
def test_a_converted_folder_answers(folder, tmp_path_factory) -> None:
    """Convert to W4A8 from a folder with in-memory parameter names, then answer about a clip and
    pictures."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDENS / "qwen2_5_vl" / "public" / "model.safetensors")
    moved = {
        "model." + n if n.startswith("visual.")
        else n.replace("model.", "model.language_model.", 1): x
        for n, x in tensors.items()
    }  # fmt: skip
    save_file(moved, folder / "model.safetensors")
    out = tmp_path_factory.mktemp("made")
    mq.convert(folder, out / "dst", str(cheap_w4a8(out)))
    model = mq.load(out / "dst")
    pictures = [INPUTS["image_0"], INPUTS["image_1"]]
    answers(out / "dst", pictures)
    assert isinstance(model.generate([[]], ["What?"], videos=[[FRAMES]], max_new_tokens=2)[0], str)


@pytest.mark.parametrize("fps", [0, -1, "two", True])
def test_frame_rates_that_cannot_be(folder, fps) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps(settings | {"fps": fps}))
    with pytest.raises(UserError, match="video_preprocessor_config.json.*fps"):
        FAMILY.processor(folder, CONFIG).prompt("", videos=[FRAMES])


def test_a_clip_by_hand() -> None:
    """2 temporal patches of 2 x 3 merged tokens, 1.3 seconds apart, at 2 positions per second."""
    ids = [1, 2, *[VIDEO] * 12, 3]
    positions, owner = mrope_positions(ids, [(2, 4, 6)], CONFIG, [1.3])
    assert positions[0].tolist() == [0, 1, *[2] * 6, *[4] * 6, 5]
    assert positions[1].tolist() == [0, 1, *[2, 2, 2, 3, 3, 3] * 2, 5]
    assert positions[2].tolist() == [0, 1, *[2, 3, 4] * 4, 5]
    assert owner.tolist() == [-1, -1, *[0] * 12, -1]


def test_text_follows_the_largest_position_of_a_stretched_clip() -> None:
    ids = [1, *[VIDEO] * 5, 2, IMAGE, 3]
    positions, _ = mrope_positions(ids, [(5, 2, 2), (1, 2, 2)], CONFIG)
    assert positions[0].tolist() == [0, 1, 3, 5, 7, 9, 10, 11, 12]
    assert positions[1].tolist() == [0, 1, 1, 1, 1, 1, 10, 11, 12]


def test_a_golden_may_name_the_seconds() -> None:
    patches = np.zeros((3 * 16, CONFIG.vision.patch_dim), np.float32)
    ids = np.array([[1, *[VIDEO] * 4, 2, *[VIDEO] * 8]])
    inputs = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values_videos": patches,
        "video_grid_thw": np.array([[1, 4, 4], [2, 4, 4]]),
        "second_per_grid_ts": np.array([1.0, 0.5], np.float32),
    }  # fmt: skip
    prompt = next(reference_prompts(inputs, CONFIG))
    assert prompt.seconds == [1.0, 0.5]
    batch = FAMILY.reference_batch(CONFIG, inputs)
    np.testing.assert_array_equal(np.unique(batch.positions[0, 0, 6:]), [4, 5])


@pytest.mark.parametrize("seconds", [[1.0, 1.0], [-1.0], [float("nan")], [1e9]])
def test_seconds_that_do_not_fit(seconds) -> None:
    patches = np.zeros((8, CONFIG.vision.patch_dim), np.float32)
    prompt = Prompt([VIDEO] * 2, [(2, 2, 2)], patches, seconds)
    with pytest.raises(PromptError, match="seconds"):
        FAMILY.collate(CONFIG, [prompt])
