"""The float CogVLM2 against outputs of the published code (tests/goldens/cogvlm2)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.models.cogvlm2 import FAMILY
from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.cogvlm2.processing import (
    collate,
    positions,
    reference_batch,
    reference_prompts,
)
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.registry import family_for
from tests.eva2_cases import ODD_TOWER
from tests.family_cases import changed_config, golden_case, model_of, random_params
from tests.family_checks import (
    RTOL,
    example_prompt,
    rows_stand_alone,
    unused_tensors,
    verified,
    wider_than_bfloat16,
)
from tests.helpers import GOLDENS, forward, golden, relative

CASE = "cogvlm2/public"


def test_every_array_and_the_greedy_tokens(tmp_path, capsys) -> None:
    arrays = verified(GOLDENS / CASE, tmp_path / "dst", capsys)
    assert {"vision_pre", "vision", "embeds", "hidden_2", "logits"} <= arrays


def test_positions_and_experts_of_the_reference() -> None:
    model, config, inputs, outputs = golden_case(CASE)
    batch = reference_batch(config, inputs)
    real = inputs["attention_mask"] == 1
    np.testing.assert_array_equal(batch.token_class >= 0, real)
    np.testing.assert_array_equal(batch.visual_index >= 0, outputs["is_visual"] == 1)
    np.testing.assert_array_equal(batch.token_class == 1, outputs["vision_expert_mask"] == 1)
    np.testing.assert_array_equal(batch.positions[0], outputs["position_ids"])
    final = model.language.norm(nnx.jit(lambda m, b: m.stream(b))(model, batch))
    assert relative(final[real], outputs["hidden_final_norm"][real]) < RTOL


def by_the_letter(types: list[int]) -> list[int]:
    """Positions of one row, step by step as the family's description defines them."""
    kinds = list(types)
    for i, t in enumerate(types):
        if t == 1:
            ends = i in (0, len(types) - 1)
            if ends or types[i - 1] == 0 or types[i + 1] == 0:
                kinds[i] = 0
    out = [0]
    for i in range(1, len(types)):
        out.append(out[-1] + (kinds[i] == 0 or (kinds[i] == 1 and kinds[i - 1] == 0)))
    return out


def test_positions_of_any_layout() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        row, n = [], rng.integers(0, 4)
        for kind in rng.integers(0, 2, rng.integers(1, 6)):
            row += [int(kind)] * int(rng.integers(1, 5))
        row = [-1] * n + row
        assert positions(np.array([row]))[0].tolist() == by_the_letter(row), row


def test_rows_do_not_depend_on_their_company() -> None:
    """Pictures first, last and adjacent, and text-only rows; padding changes nothing."""
    model, config, inputs, _ = golden_case(CASE)
    first = next(reference_prompts(config, inputs))
    picture, n = [VISUAL] * config.vision.tokens, config.vision.side**2
    patches = np.concatenate([p.patches for p in reference_prompts(config, inputs)])

    def prompt(ids, pictures):
        grids = [(1, config.vision.side, config.vision.side)] * pictures
        return dataclasses.replace(
            first, input_ids=ids, grids=grids, patches=patches[: pictures * n]
        )

    prompts = [
        prompt([5, 6, 7], 0),
        prompt([*picture, 5, 6], 1),
        prompt([5, *picture, *picture, 6, *picture], 3),
    ]
    rows_stand_alone(model, partial(collate, config), prompts, pad_to=64)
    alone = collate(config, prompts[-1:])
    # The last token of a visual run uses the language expert, even at the end of the prompt.
    assert alone.token_class[0].tolist() == [0, *[1] * 21, 0, 0, *[1] * 10, 0]
    middle = alone.positions[0, 0, 1:23].tolist()
    assert middle == [1, *[2] * 20, 3]  # adjacent pictures share one position
    assert alone.next_position.tolist() == [8]
    assert collate(config, prompts[1:2]).positions[0, 0].tolist() == [0, *[1] * 9, 2, 3, 4]


def test_stored_frequencies_are_used() -> None:
    """The stored frequencies differ from the formula's, and the logits depend on them."""
    model, config, inputs, outputs = golden_case(CASE)
    stored = np.asarray(model.language.layers.frequencies.get_value())
    computed = 500000.0 ** -(np.arange(8) / 8)
    assert 1e-4 < relative(stored[0], computed) < 1e-2
    model.language.layers.frequencies.set_value(
        jnp.broadcast_to(jnp.asarray(computed, jnp.float32), stored.shape)
    )
    real = inputs["attention_mask"] == 1
    got = forward(model, reference_batch(config, inputs))
    assert relative(got[real], outputs["logits"][real]) > 1e-4


def test_bad_references_are_said() -> None:
    _, config, inputs, _ = golden_case(CASE)
    with pytest.raises(ValueError, match="placeholders for 3"):
        reference_batch(config, inputs | {"images": np.tile(inputs["images"], (2, 1, 1, 1))})
    with pytest.raises(ValueError, match="not of 84"):
        reference_batch(config, inputs | {"images": inputs["images"][..., :56, :56]})
    prompt = next(reference_prompts(config, inputs))
    with pytest.raises(ValueError, match="visual tokens"):
        collate(config, [dataclasses.replace(prompt, grids=prompt.grids[:-1])])


def test_every_tensor_of_the_checkpoint_is_used_whole() -> None:
    assert not unused_tensors(CASE)


def test_other_sizes() -> None:
    inputs = golden(*CASE.split("/"))[1]
    changes = {
        "hidden_size": 88, "num_attention_heads": 4, "num_multi_query_heads": 4,
        "intermediate_size": 90, "vision_config": ODD_TOWER,
    }  # fmt: skip
    config = CogVLM2Config.from_hf(changed_config(CASE, **changes))
    params = random_params(FAMILY, config)
    assert np.isfinite(
        forward(model_of(FAMILY, config, params), reference_batch(config, inputs))
    ).all()
    hf = changed_config(CASE, num_attention_heads=16, hidden_size=128)
    del hf["num_multi_query_heads"]
    assert CogVLM2Config.from_hf(hf).language.num_kv_heads == 8


def test_bfloat16_stays_bfloat16() -> None:
    config = CogVLM2Config.from_hf(changed_config(CASE))
    frequencies = {f"language/layers/{i}/frequencies" for i in range(2)}
    assert wider_than_bfloat16(FAMILY, config, CASE) == frequencies


def test_measurements_need_no_tokenizer() -> None:
    model, config, _, _ = golden_case(CASE)
    prompt = example_prompt(FAMILY, config, model, 448)
    assert prompt.input_ids.count(VISUAL) == config.vision.tokens == 11


def test_the_architecture_names_the_family() -> None:
    hf = changed_config(CASE)
    assert "model_type" not in hf and family_for(hf) is FAMILY
    assert family_for(hf | {"model_type": ""}) is FAMILY
    with pytest.raises(UserError, match="CogVLMForCausalLM"):
        family_for({"architectures": ["CogVLMVideoForCausalLM"]})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"template_version": "new"}, "template_version 'new'"),
        ({"num_multi_query_heads": 4}, "4 key heads"),
        ({"vision_config": {"num_positions": 36}}, "num_positions"),
    ],
)
def test_what_is_not_handled_is_said(changes, word) -> None:
    with pytest.raises(UserError, match=word):
        CogVLM2Config.from_hf(changed_config(CASE, **changes))
    hf = changed_config(CASE)
    del hf["vision_config"]["num_positions"]
    with pytest.raises(UserError, match="vision_config.num_positions is missing"):
        CogVLM2Config.from_hf(hf)
