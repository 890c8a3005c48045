"""Folders of every family with hostile JSON values: a processor, or a one-line error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.registry import family_for
from tests.helpers import GOLDENS
from tests.hf_folders import write_tokenizer
from tests.models import (
    test_cogvlm2_processing,
    test_glm4v_processing,
    test_internvl_processing,
    test_llava_processing,
    test_minicpmv_processing,
    test_qwen2_vl_processing,
    test_qwen3_vl_processing,
    test_qwen_vl_processing,
)
from tests.models.test_config_keys import HOSTILE

# File -> keys to change: those that we or transformers read.
KEYS = {
    "config.json": ("eos_token_id", "template", "template_version", "slice_config", "model_type"),
    "generation_config.json": ("eos_token_id", "chat_format", "max_window_size", "temperature"),
    "preprocessor_config.json": (
        "size", "min_pixels", "max_pixels", "image_mean", "image_std", "norm_mean", "norm_std",
        "patch_size", "merge_size", "min_patches", "max_patches", "max_slice_nums", "im_start",
        "crop_size", "do_pad", "do_center_crop",
        "scale_resolution", "do_rescale", "rescale_factor", "resample", "use_image_id",
        "image_processor_type",
    ),
    "processor_config.json": ("image_processor", "video_processor", "chat_template", "image_token"),
    "tokenizer_config.json": (
        "chat_template", "added_tokens_decoder", "bos_token", "eos_token", "pad_token",
        "tokenizer_class", "model_max_length", "add_bos_token", "extra_special_tokens",
        "additional_special_tokens", "padding_side", "auto_map",
    ),
    "special_tokens_map.json": ("bos_token", "eos_token", "additional_special_tokens"),
    "added_tokens.json": ("<extra>",),
    "chat_template.json": ("chat_template",),
    "video_preprocessor_config.json": (
        "patch_size", "max_pixels", "fps", "size", "cap_pixels_per_frame", "resample", "do_resize",
    ),
}  # fmt: skip


def qwen2_vl(folder: Path, family: str = "qwen2_vl") -> None:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(GOLDENS / family / "public" / name, folder / name)
    write_tokenizer(folder, test_qwen2_vl_processing.SPECIAL, 384, eos_token="<|im_end|>")


def qwen_vl(folder: Path) -> None:
    shutil.copy(GOLDENS / "qwen_vl" / "public" / "config.json", folder / "config.json")
    write_tokenizer(folder, test_qwen_vl_processing.GOLDEN_TOKENS, 290, eos_token="<|endoftext|>")


def llama(folder: Path) -> None:
    shutil.copy(GOLDENS / "llama" / "public" / "config.json", folder / "config.json")
    write_tokenizer(folder, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), first=300)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "cogvlm2": test_cogvlm2_processing.make_folder,
    "glm4v": test_glm4v_processing.make_folder,
    "internvl": lambda f: test_internvl_processing.make_folder(f, "internvl/public"),
    "internvl2": lambda f: test_internvl_processing.make_folder(f, "internvl2/public"),
    "llama": llama,
    "llava": test_llava_processing.make_folder,
    "minicpmv": test_minicpmv_processing.make_folder,
    "qwen2_5_vl": lambda f: qwen2_vl(f, "qwen2_5_vl"),
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": test_qwen3_vl_processing.make_folder,
    "qwen_vl": qwen_vl,
}


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    check(folder)
    return folder


def check(folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = family_for(hf)
    family.check_processor(folder, family.config_from_hf(hf))


def try_values(made: Path, seed: int, count: int) -> int:
    """Number of refusals among ``count`` single changes; only :class:`UserError` may be raised."""
    rng, refused = random.Random(seed), 0
    for _ in range(count):
        name = rng.choice(list(KEYS))
        key, value = rng.choice(KEYS[name]), rng.choice(HOSTILE)
        path = made / name
        before = path.read_bytes() if path.exists() else None
        data = json.loads(before) if before else {}
        if isinstance(value, int) and value.bit_length() > 1000:
            continue  # json cannot write such numbers
        path.write_text(json.dumps(data | {key: value}), encoding="utf-8")
        try:
            check(made)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and len(str(e)) < 800, e
        finally:
            path.unlink() if before is None else path.write_bytes(before)
    return refused


def test_hostile_values(made) -> None:
    assert 3 <= try_values(made, 0, 25)
