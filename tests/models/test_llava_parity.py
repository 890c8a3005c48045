"""The float LLaVA against outputs of transformers (tests/goldens/llava)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_to_flax
from mquant_jax.errors import UserError
from mquant_jax.models.llava import FAMILY
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.llava.processing import collate, reference_batch, reference_prompts
from mquant_jax.models.llava.weights import canonical_name, weight_rules
from mquant_jax.models.prompts import PromptError
from mquant_jax.runtime.generate import Generator
from tests.family_cases import batch_of, changed_config, golden_case, model_of, random_params
from tests.family_checks import (
    example_prompt,
    greedy_with_the_cache,
    rows_stand_alone,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, fails, golden, mostly_slow
from tests.llava_cases import CLIP, DINOV2, GOLDEN_CASES, VARIED


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_every_array_and_the_greedy_tokens(case, tmp_path, capsys) -> None:
    arrays = verified(GOLDENS / case, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision", "embeds", "hidden_3", "logits"} <= arrays


@pytest.mark.parametrize("case", mostly_slow(GOLDEN_CASES, CLIP))
def test_greedy_tokens_in_both_layouts(case) -> None:
    model, config, _, outputs = golden_case(case)
    batch = batch_of(FAMILY, config, case)
    greedy_with_the_cache(model, batch, outputs)
    n = outputs["greedy"].shape[1]
    for layout in ("masked", "aifs"):
        out = Generator(model, (-1,), layout=layout).generate(batch, n)
        np.testing.assert_array_equal(out.tokens, outputs["greedy"])


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_rows_do_not_depend_on_their_company(case) -> None:
    model, config, inputs, _ = golden_case(case)
    prompts = reference_prompts(config, inputs)
    assert sorted(len(p.grids) for p in prompts) == [0, 1, 2]
    rows_stand_alone(model, partial(collate, config), prompts, pad_to=64)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_layers_behind_the_feature_are_not_built(case) -> None:
    model, config, _, _ = golden_case(case)
    assert config.tower_layers == 4 and len(model.vision.layers.attn_norm.weight.get_value()) < 4
    source = load_file(GOLDENS / case / "model.safetensors")
    used = {r.src for r in weight_rules(config)}
    left = set(source) - used
    assert left and all(FAMILY.ignored(n) or FAMILY.unused(config, n) for n in left)
    assert not any(FAMILY.ignored(n) or FAMILY.unused(config, n) for n in used)
    layer = "vision_tower.encoder.layer.{}.odd" if case == DINOV2 else (
        "vision_tower.vision_model.encoder.layers.{}.odd"
    )  # fmt: skip
    wanted = [i >= config.vision.num_layers and i < 4 for i in range(6)]
    assert [FAMILY.unused(config, layer.format(i)) for i in range(6)] == wanted


def test_tensors_of_used_layers_are_all_accounted_for(tmp_path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDENS / CLIP / name, tmp_path / name)
    tensors = load_file(tmp_path / "model.safetensors")
    odd = "vision_tower.vision_model.encoder.layers.0.self_attn.q_norm.weight"
    save_file(tensors | {odd: np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    family, config = FAMILY, LlavaConfig.from_hf(golden(*CLIP.split("/"))[0])
    assert not family.ignored(odd) and not family.unused(config, odd)
    assert hf_to_flax.main([str(tmp_path), str(tmp_path / "dst")]) == 2


@pytest.mark.parametrize("name", VARIED)
def test_bfloat16_stays_bfloat16(name) -> None:
    case, changes = VARIED[name]
    config = LlavaConfig.from_hf(changed_config(case, **changes))
    assert wider_than_bfloat16(FAMILY, config, case) == set()


@pytest.mark.parametrize("name", ["siglip", "dinov2 without biases"])
def test_measurements_need_no_tokenizer(name) -> None:
    case, changes = VARIED[name]
    config = LlavaConfig.from_hf(changed_config(case, **changes))
    model = model_of(FAMILY, config, random_params(FAMILY, config))
    prompt = example_prompt(FAMILY, config, model, 500)
    assert len(prompt.patches) == 16 and len(prompt.input_ids) == 10 + config.image_tokens


def test_names_of_transformers_5() -> None:
    clip, dino = "vision_tower.vision_model.", "vision_tower.encoder.layer.0.attention."
    for name, hub in {
        "model.language_model.layers.0.mlp.up_proj.weight":
            "language_model.model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
        f"model.{clip}pre_layrnorm.weight": f"{clip}pre_layrnorm.weight",
        "vision_tower.embeddings.class_embedding": f"{clip}embeddings.class_embedding",
        "vision_tower.embeddings.patch_embedding.weight":
            f"{clip}embeddings.patch_embedding.weight",
        "vision_tower.embeddings.position_embedding.weight":
            f"{clip}embeddings.position_embedding.weight",
        "vision_tower.encoder.layers.3.mlp.fc1.bias": f"{clip}encoder.layers.3.mlp.fc1.bias",
        "vision_tower.head.probe": f"{clip}head.probe",
        f"{clip}post_layernorm.bias": f"{clip}post_layernorm.bias",
        "vision_tower.embeddings.position_embeddings":
            "vision_tower.embeddings.position_embeddings",
        "vision_tower.embeddings.patch_embeddings.projection.bias":
            "vision_tower.embeddings.patch_embeddings.projection.bias",
        "vision_tower.layernorm.weight": "vision_tower.layernorm.weight",
        f"{dino}q_proj.weight": f"{dino}attention.query.weight",
        f"{dino}o_proj.bias": f"{dino}output.dense.bias",
        f"{dino}attention.value.bias": f"{dino}attention.value.bias",
    }.items():  # fmt: skip
        assert canonical_name(name) == hub and canonical_name(hub) == hub


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_a_folder_with_the_names_of_memory(case, tmp_path, capsys) -> None:
    """transformers 5 saves models that were created in memory under other parameter names."""
    names = {
        "language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head",
        "vision_tower.vision_model.": "model.vision_tower.", "vision_tower.": "model.vision_tower.",
        "multi_modal": "model.multi_modal", "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj", "attention.output.dense": "attention.o_proj",
        "attention.attention.value": "attention.v_proj",
    }  # fmt: skip
    folder = tmp_path / "src"
    shutil.copytree(GOLDENS / case, folder)

    def renamed(name: str) -> str:
        prefix = next((p for p in names if name.startswith(p)), "")
        name = names.get(prefix, "") + name.removeprefix(prefix)
        for hub, memory in list(names.items())[5:]:
            name = name.replace(hub, memory)
        return name

    tensors = {renamed(n): x for n, x in load_file(folder / "model.safetensors").items()}
    assert "model.vision_tower.vision_model" not in "".join(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert "logits" in verified(folder, tmp_path / "dst", capsys)


def test_other_sizes_and_counts_are_refused() -> None:
    hf, inputs, _ = golden(*CLIP.split("/"))
    config = LlavaConfig.from_hf(hf)
    prompts = reference_prompts(config, inputs)
    pixels = inputs["pixel_values"]
    with pytest.raises(PromptError, match="pictures of 56 x 56 pixels"):
        reference_batch(config, inputs | {"pixel_values": pixels[..., :42, :42]})
    with pytest.raises(PromptError, match="2 pictures given|3 pictures given"):
        reference_batch(config, inputs | {"input_ids": 0 * inputs["input_ids"]})
    two = next(p for p in prompts if len(p.grids) == 2)
    for grids in ([(1, 3, 3)] * 2, [(2, 4, 4)], [(1, 2, 8)] * 2):
        with pytest.raises(PromptError, match="prompt 0: a picture of"):
            collate(config, [dataclasses.replace(two, grids=grids)])
    with pytest.raises(PromptError, match="prompt 1: 32 placeholders, but 16 visual tokens"):
        collate(config, [two, dataclasses.replace(two, grids=two.grids[:1])])


def test_published_defaults_and_both_names_of_the_placeholder() -> None:
    bare = LlavaConfig.from_hf({"model_type": "llava"})
    assert bare.image_tokens == 576 and bare.image_token_id == 32000
    assert bare.vision.num_layers == 23 and bare.tower_layers == 24
    hf = changed_config(CLIP)
    other = {**hf, "image_token_id": hf.pop("image_token_index")}
    assert "image_token_index" not in hf
    other.pop("image_token_index")
    assert LlavaConfig.from_hf(other) == LlavaConfig.from_hf(changed_config(CLIP))
    fails("make them agree", lambda: LlavaConfig.from_hf(other | {"image_token_index": 5}))


def test_a_tie_counts_wherever_it_stands() -> None:
    assert LlavaConfig.from_hf(changed_config(DINOV2)).language.tied_head
    assert not LlavaConfig.from_hf(changed_config(CLIP)).language.tied_head
    assert LlavaConfig.from_hf(changed_config(CLIP, tie_word_embeddings=True)).language.tied_head


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        (CLIP, {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type 'pixtral'"),
        (CLIP, {"text_config": {"model_type": "mistral"}}, "text_config.model_type 'mistral'"),
        (CLIP, {"vision_feature_layer": 0}, "vision_feature_layer 0 .*expected 1 to 4"),
        (CLIP, {"vision_feature_layer": 5}, "vision_feature_layer 5"),
        (CLIP, {"vision_feature_layer": -5}, "vision_feature_layer -5"),
        (CLIP, {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\]"),
        (CLIP, {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy 'cls'"),
        (CLIP, {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        (CLIP, {"vision_config": {"image_size": [56, 70]}}, "not square"),
        (CLIP, {"vision_config": {"patch_size": 57}}, "has no patch"),
        (DINOV2, {"vision_config": {"use_swiglu_ffn": True}}, "use_swiglu_ffn"),
    ],
)
def test_what_is_not_handled_is_said(case, changes, word) -> None:
    hf = json.loads(json.dumps(changed_config(case, **changes)))
    with pytest.raises(UserError, match=word):
        LlavaConfig.from_hf(hf)
