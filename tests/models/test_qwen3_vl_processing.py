"""Qwen3-VL's pictures, clips and prompts; the rest is shared with Qwen2-VL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mquant_jax as mq
from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl.processing import mrope_positions
from mquant_jax.models.qwen3_vl import FAMILY
from mquant_jax.models.qwen3_vl.processor import clip_size
from tests.family_checks import answers, cheap_w4a8
from tests.helpers import GOLDENS, golden
from tests.hf_folders import write_tokenizer
from tests.models.test_qwen2_vl_processing import SPECIAL

CASE = GOLDENS / "qwen3_vl" / "public"
HF, INPUTS, _ = golden("qwen3_vl", "public")
CONFIG = FAMILY.config_from_hf(HF)
IMAGE, VIDEO = CONFIG.image_token_id, CONFIG.video_token_id
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 90, 130, 3), np.uint8)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<|vision_start|><|{{ p.type }}_pad|>"
    "<|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def make_folder(folder: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(CASE / name, folder / name)
    write_tokenizer(folder, SPECIAL, 384, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture
def folder(tmp_path) -> Path:
    make_folder(tmp_path)
    return tmp_path


def video_settings(folder: Path, **changes) -> None:
    """Write the published video_preprocessor_config.json with ``changes``."""
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps(settings | changes))


def text_of(processor, ids: list[int]) -> str:
    """The prompt's text, with each run of placeholders as one."""
    once = [t for i, t in enumerate(ids) if t not in (IMAGE, VIDEO) or ids[i - 1] != t]
    return processor.tokenizer.decode(once)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_pictures_and_prompt_match_the_reference(folder, template) -> None:
    if template:
        (folder / "chat_template.jinja").write_text(template)
    processor = FAMILY.processor(folder, CONFIG)
    prompt = processor.prompt("What?", [INPUTS[f"image_{i}"] for i in range(3)])
    np.testing.assert_allclose(prompt.patches, INPUTS["pixel_values"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(prompt.grids, INPUTS["image_grid_thw"])
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text_of(processor, prompt.input_ids) == (
        f"<|im_start|>user\n{3 * picture}What?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("size", [(33, 47), (480, 640), (31, 900), (200, 64)])
def test_pictures_are_those_of_transformers(folder, size) -> None:
    from transformers import Qwen2VLImageProcessorPil

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    theirs = Qwen2VLImageProcessorPil(**settings)(images=[picture], return_tensors="np")
    prompt = FAMILY.processor(folder, CONFIG).prompt("", [picture])
    np.testing.assert_array_equal(prompt.patches, theirs["pixel_values"])
    np.testing.assert_array_equal(prompt.grids, theirs["image_grid_thw"])


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(
    ("count", "fps", "times"),
    [
        (4, None, "0.2 1.2"), (5, 2, "0.2 1.2 2.0"), (4, 1, "0.5 2.5"), (1, 2.0, "0.0"),
        (5, 4, "0.1 0.6 1.0"), (2, 0.5, "1.0"),
    ],
)  # fmt: skip
def test_every_temporal_patch_has_its_time(folder, template, count, fps, times) -> None:
    """A temporal patch has the mean time of its first and last frame; a repeated last frame keeps
    its time."""
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if fps is not None:
        video_settings(folder, fps=fps)
    processor = FAMILY.processor(folder, CONFIG)
    prompt = processor.prompt("And <|image_pad|>?", [INPUTS["image_2"]], [FRAMES[:count]])
    group = "<|vision_start|><|video_pad|><|vision_end|>"
    clip = "".join(f"<{time} seconds>{group}" for time in times.split())
    assert text_of(processor, prompt.input_ids) == (
        f"<|im_start|>user\n{clip}And <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    patches = len(times.split())
    assert prompt.grids == [(1, 6, 8)] * patches + [(1, 4, 4)]
    assert prompt.input_ids.count(VIDEO) == 12 * patches
    mrope_positions(prompt.input_ids, prompt.grids, CONFIG)
    processor.collate([prompt, processor.prompt("x")])


def test_frames_of_a_clip(folder) -> None:
    """Frames are resized like pictures; each patch has two frames, and the last one is repeated."""
    video_settings(folder)
    processor = FAMILY.processor(folder, CONFIG)
    prompt = processor.prompt("", videos=[FRAMES])
    exact = [Image.fromarray(f).resize((128, 96), Image.Resampling.BICUBIC) for f in FRAMES]
    stills = [processor.prompt("", [f]).patches.reshape(48, 3, 2, 16, 16) for f in exact]
    got = prompt.patches.reshape(3, 48, 3, 2, 16, 16)
    for i, (first, last) in enumerate(((0, 1), (2, 3), (4, 4))):
        np.testing.assert_allclose(got[i, :, :, 0], stills[first][:, :, 0], atol=1e-6)
        np.testing.assert_allclose(got[i, :, :, 1], stills[last][:, :, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "size", "bounds", "expected"),
    [
        (8, (360, 640), (131072, 786432), (224, 416)),
        (3, (48, 1000), (4096, 25165824), (64, 992)),
        (64, (1080, 1920), (4096, 25165824), (448, 832)),
        (4, (20, 30), (131072, 786432), (160, 224)),
        (2, (90, 70), (4096, 25165824), (96, 64)),
    ],
)
def test_sizes_of_clips_are_those_of_transformers(frames, size, bounds, expected) -> None:
    """Expected values come from its ``smart_resize`` for clips, which needs torchvision."""
    assert clip_size(frames, *size, 32, 2, *bounds) == expected


def test_the_budget_is_for_the_whole_clip(folder) -> None:
    video_settings(folder, size={"shortest_edge": 4096, "longest_edge": 4 * 64 * 64})
    processor = FAMILY.processor(folder, CONFIG)
    assert processor.prompt("", videos=[FRAMES[:2]]).grids == [(1, 4, 6)]
    assert processor.prompt("", videos=[FRAMES[:4]]).grids == [(1, 2, 4)] * 2
    video_settings(folder, cap_pixels_per_frame=True, max_video_tokens=2)
    assert FAMILY.processor(folder, CONFIG).prompt("", videos=[FRAMES[:2]]).grids == [(1, 2, 4)]


def test_a_text_is_nothing_but_text(folder) -> None:
    """A placeholder typed in a chat is not replaced by a clip."""
    processor = FAMILY.processor(folder, CONFIG)
    content = [{"type": "video", "video": list(FRAMES[:2])},
               {"type": "text", "text": "a<|video_pad|>b <|vision_start|>"}]  # fmt: skip
    prompt = processor.chat([{"role": "user", "content": content}])
    assert prompt.grids == [(1, 6, 8)] and prompt.input_ids.count(VIDEO) == 12


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"fps": 0}, "fps"), ({"patch_size": 14}, "patch_size"), ({"max_video_tokens": 0}, "max_v"),
        ({"size": {"shortest_edge": 99, "longest_edge": 9}}, "at least 99 and at most 9 pixels"),
        ({"cap_pixels_per_frame": "no"}, "cap_pixels"), ({"do_resize": False}, "video 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(folder, settings, word) -> None:
    video_settings(folder, **settings)
    with pytest.raises(UserError, match=word):
        FAMILY.processor(folder, CONFIG).prompt("", videos=[FRAMES])


def test_clips_and_places_must_agree(folder) -> None:
    processor = FAMILY.processor(folder, CONFIG)
    with pytest.raises(UserError, match="2 video placeholders, but 1 videos"):
        processor.prompt("<|video_pad|> <|video_pad|>", videos=[FRAMES])
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].role }}")
    with pytest.raises(UserError, match="template made 0 video placeholders"):
        FAMILY.processor(folder, CONFIG).prompt("", videos=[FRAMES])
    with pytest.raises(UserError, match="none is more than 200 times"):
        processor.prompt("", videos=[np.zeros((2, 9, 3000, 3), np.uint8)])


@pytest.mark.slow
def test_a_converted_folder_answers(folder, tmp_path_factory) -> None:
    """Convert to W4A8, then answer about a clip and pictures."""
    shutil.copy(CASE / "model.safetensors", folder)
    out = tmp_path_factory.mktemp("made")
    mq.convert(folder, out / "dst", str(cheap_w4a8(out)))
    answers(out / "dst", [INPUTS["image_0"], INPUTS["image_1"]])
    model = mq.load(out / "dst")
    assert isinstance(model.generate([[]], ["What?"], videos=[[FRAMES]], max_new_tokens=2)[0], str)
