"""Defaults of config.json are those of transformers' config classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mquant_jax.models.config_keys import read_tables
from mquant_jax.models.language_config import SCHEMAS
from mquant_jax.models.registry import family_for
from tests.config_cases import FULL, GOLDEN, config_of


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("diff", [False, True])
def test_defaults_of_language_models_are_those_of_transformers(name, diff) -> None:
    import transformers

    published = getattr(transformers, f"{name}Config")()
    schema = SCHEMAS[name.lower()]
    saved = json.loads(published.to_json_string(use_diff=diff))
    assert schema.unknown(saved) == []
    assert_defaults(schema.read({}, "config.json"), published)


def assert_defaults(values: dict[str, Any], published: Any) -> None:
    for key, value in values.items():
        if value is not None and hasattr(published, key):
            assert value == getattr(published, key), key


def config_of_defaults(published: Any, width: tuple[str, int], text: str) -> Any:
    """Our config of transformers' default one, which is that of a file without defaults.

    Args:
        width: a key of vision_config and a value that fits; the default sub-configs do not match.
        text: the table that holds the text model's keys.
    """
    key, value = width
    saved = json.loads(published.to_json_string(use_diff=False))
    saved["vision_config"][key] = value
    config = config_of(saved)
    assert family_for(saved).unknown_keys(saved) == []
    bare = {"model_type": published.model_type, "vision_config": {key: value}}
    assert config_of(bare) == config
    tables = read_tables(family_for(bare).config_tables(bare))
    assert_defaults(tables[text], published.text_config)
    tables["vision_config"].pop(key)
    assert_defaults(tables["vision_config"], published.vision_config)
    return config


def test_defaults_of_qwen2_vl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.Qwen2VLConfig()
    assert published.text_config.rope_parameters["rope_theta"] == 1e6
    config = config_of_defaults(published, ("hidden_size", 8192), "")
    assert config.language.rope_theta == 1e6 and config.vision.rope_theta == 10000.0


def test_defaults_of_qwen2_5_vl_are_those_of_transformers() -> None:
    import transformers

    config = config_of_defaults(transformers.Qwen2_5_VLConfig(), ("out_hidden_size", 8192), "")
    assert config.tokens_per_second == 4 and config.vision.full_layers == (7, 15, 23, 31)


def test_defaults_of_qwen3_vl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.Qwen3VLConfig()
    config = config_of_defaults(published, ("out_hidden_size", 4096), "text_config")
    assert config.vision.taps == (8, 16, 24) and config.vision.position_grid == 48


def resaved(published: Any) -> Iterator[dict[str, Any]]:
    """What ``save_pretrained`` writes: differences from the defaults, or everything."""
    for diff in (False, True):
        yield json.loads(published.to_json_string(use_diff=diff))


@pytest.mark.parametrize("name", ["qwen2_5_vl/public", "qwen2.5-vl-7b", "qwen2.5-vl-3b"])
def test_qwen2_5_vl_saved_again_by_transformers(name) -> None:
    """``save_pretrained`` nests the text model's keys and renames some."""
    import transformers

    hf = (GOLDEN | FULL)[name]
    for saved in resaved(transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(hf))):
        assert "text_config" in saved and family_for(saved).unknown_keys(saved) == []
        assert config_of(saved) == config_of(hf)


@pytest.mark.parametrize("name", ["qwen3_vl/public", "qwen3-vl-2b", "qwen3-vl-8b"])
def test_qwen3_vl_saved_again_by_transformers(name) -> None:
    import transformers

    hf = (GOLDEN | FULL)[name]
    for saved in resaved(transformers.Qwen3VLConfig.from_dict(copy.deepcopy(hf))):
        assert "rope_parameters" in saved["text_config"]
        assert family_for(saved).unknown_keys(saved) == []
        assert config_of(saved) == config_of(hf)


def test_defaults_of_internvl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.InternVLConfig()
    saved = json.loads(published.to_json_string(use_diff=False))
    assert family_for(saved).unknown_keys(saved) == []
    bare = {"model_type": "internvl"}
    tables = read_tables(family_for(bare).config_tables(bare))
    tables["vision_config"].update(image_size=(448, 448), patch_size=(14, 14))
    assert_defaults(tables["vision_config"], published.vision_config)
    assert_defaults(tables["text_config"], published.text_config)
    assert_defaults(tables[""], published)
    with_tie = {"tie_word_embeddings": True, "model_type": "internvl"}
    assert config_of(saved) == config_of(with_tie)


@pytest.mark.parametrize("tower", ["CLIPVision", "SiglipVision", "Dinov2"])
@pytest.mark.parametrize("language", ["Llama", "Qwen2"])
def test_defaults_of_llava_are_those_of_transformers(tower, language) -> None:
    import transformers

    vision, text = (getattr(transformers, f"{name}Config")() for name in (tower, language))
    published = transformers.LlavaConfig(vision_config=vision, text_config=text)
    saved = json.loads(published.to_json_string(use_diff=False))
    assert family_for(saved).unknown_keys(saved) == []
    bare = {
        "model_type": "llava", "vision_config": {"model_type": vision.model_type},
        "text_config": {"model_type": text.model_type},
    }  # fmt: skip
    assert config_of(bare) == config_of(saved)
    tables = read_tables(family_for(bare).config_tables(bare))
    assert_defaults(tables["vision_config"], vision)
    assert_defaults(tables["text_config"], text)


def test_llava_without_a_tower_has_the_published_one() -> None:
    import transformers

    published, bare = transformers.LlavaConfig(), {"model_type": "llava"}
    assert config_of(bare) == config_of(json.loads(published.to_json_string(use_diff=False)))
    assert_defaults(read_tables(family_for(bare).config_tables(bare))[""], published)


def test_a_fine_tune_saved_as_differences() -> None:
    """The ``vision_config`` of a published Qwen2-VL fine-tune has only four keys."""
    hf = {k: v for k, v in FULL["qwen2_vl-2b"].items() if k != "rope_theta"}
    hf["vision_config"] = {
        "hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14,
    }  # fmt: skip
    assert config_of(hf) == config_of(FULL["qwen2_vl-2b"])
    assert family_for(hf).unknown_keys(hf) == []


def test_minicpmv_without_a_tower_has_the_published_one() -> None:
    hf = {k: v for k, v in FULL["minicpmv-2.6"].items() if k not in ("vision_config", "query_num")}
    assert config_of(hf) == config_of(FULL["minicpmv-2.6"])
