"""The key tables of config.json: published configs, published defaults, hostile values."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.aot.sizes import MODELS
from mquant_jax.errors import UserError
from mquant_jax.models.config_keys import read_tables
from mquant_jax.models.language_config import SCHEMAS
from mquant_jax.models.registry import family_for
from tests.helpers import GOLDENS
from tests.models import (
    test_cogvlm2_sizes,
    test_glm4v_sizes,
    test_internvl_sizes,
    test_llava_sizes,
    test_qwen2_5_vl_sizes,
    test_qwen3_vl_sizes,
    test_qwen_vl_sizes,
)

GOLDEN = {
    str(path.parent.relative_to(GOLDENS)): json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(GOLDENS.glob("*/*/config.json"))
}
# From the repository of InternVL3-1B, with keys for experts that the model does not have.
INTERNVL3_1B = {
    "architectures": ["InternVLChatModel"], "auto_map": {}, "downsample_ratio": 0.5,
    "dynamic_image_size": True, "force_image_size": 448, "hidden_size": 896, "image_fold": None,
    "llm_config": {
        "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864,
        "layer_types": ["full_attention"] * 24, "max_position_embeddings": 32768,
        "max_window_layers": 70, "model_type": "qwen2", "moe_config": None,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
        "use_bfloat16": True, "use_cache": False, "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat",
    "output_attentions": False, "pad2square": False, "ps_version": "v2", "select_layer": -1,
    "system_message": None, "template": "internvl2_5", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": None, "use_backbone_lora": 0,
    "use_llm_lora": 0, "use_thumbnail": True,
    "vision_config": {
        "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "auto_map": {},
        "capacity_factor": 1.2, "drop_path_rate": 0.1, "dropout": 0.0,
        "eval_capacity_factor": 1.4, "hidden_act": "gelu", "hidden_size": 1024,
        "image_size": 448, "initializer_factor": 0.1, "initializer_range": 1e-10,
        "intermediate_size": 4096, "laux_allreduce": "all_nodes", "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b", "moe_coeff_ratio": 0.5, "moe_intermediate_size": 768,
        "moe_output_scale": 4.0, "noisy_gate_policy": "RSample_before",
        "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
        "num_experts": 8, "num_hidden_layers": 24, "num_routed_experts": 4,
        "num_shared_experts": 4, "patch_size": 14, "qk_normalization": False, "qkv_bias": True,
        "shared_expert_intermediate_size": 3072, "torch_dtype": "bfloat16",
        "use_bfloat16": True, "use_flash_attn": False, "use_moe": False, "use_residual": True,
        "use_rts": False, "use_weighted_residual": False,
    },
}  # fmt: skip
FULL = {
    **MODELS,
    "internvl3-1b": INTERNVL3_1B,
    "cogvlm2": test_cogvlm2_sizes.PUBLISHED,
    "glm4v": test_glm4v_sizes.PUBLISHED,
    "internvl3-8b": test_internvl_sizes.INTERNVL3_8B,
    "internvl3-38b": test_internvl_sizes.INTERNVL3_38B,
    "llava-1.5-7b": test_llava_sizes.LLAVA_7B,
    "llava-siglip-llama3": test_llava_sizes.MANTIS_8B,
    "llava-dinov2-qwen2": test_llava_sizes.DINO_QWEN,
    "qwen2.5-vl-7b": test_qwen2_5_vl_sizes.QWEN2_5_VL_7B,
    "qwen2.5-vl-3b": test_qwen2_5_vl_sizes.QWEN2_5_VL_3B,
    "qwen3-vl-2b": test_qwen3_vl_sizes.QWEN3_VL_2B,
    "qwen3-vl-8b": test_qwen3_vl_sizes.QWEN3_VL_8B,
    "qwen_vl": test_qwen_vl_sizes.PUBLISHED,
}


def config_of(hf: dict[str, Any]) -> Any:
    return family_for(hf).config_from_hf(hf)


@pytest.mark.parametrize("name", [*GOLDEN, *FULL])
def test_published_configs_have_no_unknown_keys(name) -> None:
    hf = (GOLDEN | FULL)[name]
    assert family_for(hf).unknown_keys(hf) == []
    assert config_of(hf)


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


def test_defaults_of_qwen2_vl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.Qwen2VLConfig()
    assert published.text_config.rope_parameters["rope_theta"] == 1e6
    saved = json.loads(published.to_json_string(use_diff=False))
    saved["vision_config"]["hidden_size"] = 8192  # the default sub-configs do not match
    config = config_of(saved)
    assert family_for(saved).unknown_keys(saved) == []
    assert config.language.rope_theta == 1e6 and config.vision.rope_theta == 10000.0
    bare = {"model_type": "qwen2_vl", "vision_config": {"hidden_size": 8192}}
    assert config_of(bare) == config
    tables = read_tables(family_for(bare).config_tables(bare))
    assert_defaults(tables[""], published.text_config)
    tables["vision_config"].pop("hidden_size")
    assert_defaults(tables["vision_config"], published.vision_config)


def test_defaults_of_qwen2_5_vl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.Qwen2_5_VLConfig()
    saved = json.loads(published.to_json_string(use_diff=False))
    saved["vision_config"]["out_hidden_size"] = 8192  # the default sub-configs do not match
    config = config_of(saved)
    assert family_for(saved).unknown_keys(saved) == []
    assert config.tokens_per_second == 4 and config.vision.full_layers == (7, 15, 23, 31)
    bare = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}}
    assert config_of(bare) == config
    tables = read_tables(family_for(bare).config_tables(bare))
    assert_defaults(tables[""], published.text_config)
    tables["vision_config"].pop("out_hidden_size")
    assert_defaults(tables["vision_config"], published.vision_config)


@pytest.mark.parametrize("name", ["qwen2_5_vl/public", "qwen2.5-vl-7b", "qwen2.5-vl-3b"])
def test_qwen2_5_vl_saved_again_by_transformers(name) -> None:
    """``save_pretrained`` nests the text model's keys and renames some."""
    import transformers

    hf = (GOLDEN | FULL)[name]
    published = transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(hf))
    for diff in (False, True):
        saved = json.loads(published.to_json_string(use_diff=diff))
        assert "text_config" in saved and family_for(saved).unknown_keys(saved) == []
        assert config_of(saved) == config_of(hf)


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


def test_defaults_of_qwen3_vl_are_those_of_transformers() -> None:
    import transformers

    published = transformers.Qwen3VLConfig()
    saved = json.loads(published.to_json_string(use_diff=False))
    saved["vision_config"]["out_hidden_size"] = 4096  # the default sub-configs do not match
    config = config_of(saved)
    assert family_for(saved).unknown_keys(saved) == []
    assert config.vision.taps == (8, 16, 24) and config.vision.position_grid == 48
    bare = {"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}}
    assert config_of(bare) == config
    tables = read_tables(family_for(bare).config_tables(bare))
    assert_defaults(tables["text_config"], published.text_config)
    tables["vision_config"].pop("out_hidden_size")
    assert_defaults(tables["vision_config"], published.vision_config)


@pytest.mark.parametrize("name", ["qwen3_vl/public", "qwen3-vl-2b", "qwen3-vl-8b"])
def test_qwen3_vl_saved_again_by_transformers(name) -> None:
    import transformers

    hf = (GOLDEN | FULL)[name]
    published = transformers.Qwen3VLConfig.from_dict(copy.deepcopy(hf))
    for diff in (False, True):
        saved = json.loads(published.to_json_string(use_diff=diff))
        assert "rope_parameters" in saved["text_config"]
        assert family_for(saved).unknown_keys(saved) == []
        assert config_of(saved) == config_of(hf)


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


def test_the_language_model_of_internvl_is_known_by_its_type_as_well() -> None:
    for case in ("internvl2/public", "internvl2/public_qwen2"):
        hf = copy.deepcopy(GOLDEN[case])
        del hf["llm_config"]["architectures"]
        assert config_of(hf) == config_of(GOLDEN[case])


def test_minicpmv_without_a_tower_has_the_published_one() -> None:
    hf = {k: v for k, v in FULL["minicpmv-2.6"].items() if k not in ("vision_config", "query_num")}
    assert config_of(hf) == config_of(FULL["minicpmv-2.6"])


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
