"""The key tables of config.json: published configs, refused keys, hostile values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.registry import family_for
from tests.config_cases import FULL, GOLDEN, config_of


@pytest.mark.parametrize("name", [*GOLDEN, *FULL])
def test_published_configs_have_no_unknown_keys(name) -> None:
    hf = (GOLDEN | FULL)[name]
    assert family_for(hf).unknown_keys(hf) == []
    assert config_of(hf)


def test_towers_of_qwen2_5_vl() -> None:
    def tower(**vision):
        hf = copy.deepcopy(GOLDEN["qwen2_5_vl/public"])
        return config_of(hf | {"vision_config": hf["vision_config"] | vision}).vision

    assert (tower().window, tower().full_layers) == (4, (1,))
    assert (tower(window_size=83).window, tower(window_size=84).window) == (4, 6)
    assert tower(fullatt_block_indexes=[]).full_layers == ()
    assert tower(fullatt_block_indexes=[2, 0, 9, 2]).full_layers == (0, 2)
    assert tower(fullatt_block_indexes=[0, 1, 2]).window == 0  # every layer sees the picture
    for key, value in (("window_size", 27), ("fullatt_block_indexes", [-1]),
                       ("hidden_act", "gelu"), ("out_hidden_size", 95),
                       ("tokens_per_second", 0)):  # fmt: skip
        with pytest.raises(UserError, match=f"vision_config.{key}"):
            tower(**{key: value})


def test_texts_of_qwen3_vl() -> None:
    def text(top=None, **keys):
        hf = copy.deepcopy(FULL["qwen3-vl-8b"])
        hf["text_config"] = {k: v for k, v in (hf["text_config"] | keys).items() if v is not None}
        return config_of(hf | (top or {})).language

    assert text().rope_streams[:6] == (0, 1, 2, 0, 1, 2) and text().rope_streams[57:] == (
        0, 1, 2, 0, 0, 0, 0,
    )  # fmt: skip
    # transformers 4 does not save keys that have their default value.
    assert text(rope_theta=None).rope_theta == 5e6
    assert text({"transformers_version": "5.24.0"}, rope_theta=None).rope_theta == 5e5
    assert text(rope_scaling=None) == text()
    for tied in ({"top": {"tie_word_embeddings": True}}, {"tie_word_embeddings": True}):
        assert text(**tied).tied_head
    rope = FULL["qwen3-vl-8b"]["text_config"]["rope_scaling"]
    for key, value in (("mrope_interleaved", False), ("mrope_section", [24, 20, 19])):
        with pytest.raises(UserError, match=f"text_config.rope_scaling.{key}"):
            text(rope_scaling=rope | {key: value})
    hf = copy.deepcopy(GOLDEN["qwen2_vl/public"])
    hf["rope_scaling"]["mrope_interleaved"] = True
    with pytest.raises(UserError, match="rope_scaling.mrope_interleaved"):
        config_of(hf)


def test_towers_of_qwen3_vl() -> None:
    def tower(**vision):
        hf = copy.deepcopy(GOLDEN["qwen3_vl/public"])
        return config_of(hf | {"vision_config": hf["vision_config"] | vision}).vision

    assert tower().taps == (0, 2) and tower(deepstack_visual_indexes=[]).taps == ()
    assert tower(num_position_embeddings=1).position_grid == 1
    for key, value in (("deepstack_visual_indexes", [2, 0]), ("deepstack_visual_indexes", [1, 1]),
                       ("deepstack_visual_indexes", [4]), ("deepstack_visual_indexes", [0, -1]),
                       ("deepstack_visual_indexes", [0, 1, 2, 3]), ("out_hidden_size", 48),
                       ("num_position_embeddings", 35), ("hidden_act", "relu"),
                       ("in_channels", 1)):  # fmt: skip
        with pytest.raises(UserError, match=f"vision_config.{key}"):
            tower(**{key: value})


def test_the_language_model_of_internvl_is_known_by_its_type_as_well() -> None:
    for case in ("internvl2/public", "internvl2/public_qwen2"):
        hf = copy.deepcopy(GOLDEN[case])
        del hf["llm_config"]["architectures"]
        assert config_of(hf) == config_of(GOLDEN[case])


@pytest.mark.parametrize(
    ("case", "path", "key", "value"),
    [
        ("llama/public", "", "num_local_experts", 8),
        ("llama/public", "", "final_logit_softcapping", 30.0),
        ("llama/public", "", "alibi", True),
        ("qwen2/public", "", "partial_rotary_factor", 0.5),
        ("qwen2_vl/public", "", "embedding_multiplier", 12.0),
        ("qwen2_vl/public", "vision_config", "in_chans", 1),
        ("qwen2_vl/public", "vision_config", "in_channels", 4),
        ("internvl2/public", "", "use_llm_lora", 16),
        ("internvl2/public", "", "pad2square", True),
        ("internvl2/public", "vision_config", "use_moe", True),
        ("qwen2/public", "", "use_mrope", True),
        ("llama/public", "", "use_qk_norm", True),
        ("qwen2_vl/public", "vision_config", "window_size", 112),
        ("qwen2_5_vl/public", "vision_config", "in_chans", 1),
        ("qwen2_5_vl/public", "vision_config", "embed_dim", 64),
        ("internvl2/public", "llm_config", "attn_logit_softcapping", 50.0),
        ("internvl/public", "vision_config", "use_absolute_position_embeddings", False),
        ("llava/public_dinov2", "vision_config", "use_swiglu_ffn", True),
        ("llava/public", "text_config", "attn_logit_softcapping", 30.0),
        ("minicpmv2_6/public", "", "scale_emb", 12),
        ("minicpmv2_6/public", "", "slice_mode", False),
        ("glm4v/public", "", "quantization_bit", 4),
        ("glm4v/public", "", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("cogvlm2/public", "", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("qwen_vl/public", "", "rope_scaling", {"type": "yarn", "factor": 2.0}),
    ],
)
def test_keys_that_change_numbers_are_refused_by_name(case, path, key, value) -> None:
    hf = copy.deepcopy(GOLDEN[case])
    (hf[path] if path else hf)[key] = value
    with pytest.raises(UserError, match=f"{path}.*{key}"):
        config_of(hf)


def test_neutral_values_are_no_matter() -> None:
    hf = GOLDEN["llama/public"] | {
        "partial_rotary_factor": 1.0,
        "num_experts": None,
        "alibi": False,
    }
    assert config_of(hf) == config_of(GOLDEN["llama/public"])


def test_other_keys_are_named() -> None:
    hf = copy.deepcopy(GOLDEN["qwen2_vl/public"])
    hf["my_note"] = 1
    hf["vision_config"]["colour"] = "blue"
    assert family_for(hf).unknown_keys(hf) == ["my_note", "vision_config.colour"]


HOSTILE = (
    None, True, -1, 0, 1, 3, 0.5, -0.0, 1e30, 1e308, float("nan"), float("inf"), 2**31, 2**70,
    10**5000, "", "wide", "1", [], [[]], [1, 2], {}, {"a": {"b": []}}, "\ud800", [None] * 3,
)  # fmt: skip


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all keys of an object and of the objects in it."""
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("case", [*GOLDEN, "qwen2_vl-7b"])
def test_hostile_values_are_refused_in_one_line_that_names_the_key(case) -> None:
    """For each key and each hostile value: either a valid config or a one-line error."""
    published = (GOLDEN | FULL)[case]
    refused = 0
    for path in places(published):
        for value in HOSTILE:
            hf = copy.deepcopy(published)
            at = hf
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            try:
                family = family_for(hf)
                config = family.config_from_hf(hf)
                assert len(family.weight_rules(config)) < 2**17
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 500, e
                assert "config.json" in str(e)
    assert refused > 200


def test_nested_without_end() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for key in ("vision_config", "hidden_size", "rope_scaling", "architectures", "model_type"):
        hf = GOLDEN["qwen2_vl/public"] | {key: deep}
        if key == "architectures":
            assert config_of(hf)
            continue
        with pytest.raises(UserError, match=key):
            config_of(hf)
