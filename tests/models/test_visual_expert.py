"""CogVLM2's two experts: no double work under AIFS; each is calibrated on its own tokens only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.models.base import abstract_model
from mquant_jax.models.cogvlm2 import FAMILY
from mquant_jax.nn.act_quant import SINK, VISUAL
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.presets import METHODS, PRESETS
from mquant_jax.ptq import sequential
from mquant_jax.ptq.pipeline import (
    float_model,
    no_progress,
    quantize_params,
)
from mquant_jax.ptq.smooth import smooth_params
from mquant_jax.ptq.tune import tune
from mquant_jax.recipe import Calibration, Recipe, Section, Tuning, Weights
from mquant_jax.runtime.generate import decode, prefill
from mquant_jax.runtime.tokens import arrange, restore
from tests.family_cases import changed_config, golden_case, golden_params
from tests.helpers import dot_flops, forward, golden, looked, relative

CASE = "cogvlm2/public"
W8A8 = Recipe(
    "w8a8-language",
    language=Section(8, None, "static"),
    rotate=True,
    sink_class=True,
    weights=Weights(method="rtn"),
    calibration=Calibration(headroom=1.0),
)
FLIPS = 0.02  # a few int8 values round differently; a wrong expert gives about 1


def case():
    config = FAMILY.config_from_hf(changed_config(CASE))
    batch = FAMILY.reference_batch(config, golden(*CASE.split("/"))[1])
    return config, jax.tree.map(np.asarray, batch)


def expert_size(c) -> int:
    """Number of dense weights in one expert of one layer."""
    q, kv, d = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    return 2 * q * d + 2 * kv * d + 3 * c.intermediate_size * d


def flops(model, batch) -> int:
    """Matrix-product operations of the decoder's layers."""
    x = jnp.zeros((*batch.input_ids.shape, model.language.cfg.hidden_size))

    def run(model, batch, x):
        return model.language(
            x, batch.positions, batch.order, batch.token_class,
            visual_slots=batch.visual_slots, visual=batch.token_class == VISUAL,
        )  # fmt: skip

    return dot_flops(run, model, batch, x)


def test_under_aifs_each_token_costs_one_expert() -> None:
    model, config, _, _ = golden_case(CASE)
    c, (_, batch) = config.language, case()
    moved, _ = arrange(batch)
    rows, width = moved.input_ids.shape
    assert 0 < moved.visual_slots < width
    once = 2 * rows * width * expert_size(c) * c.num_layers
    # Scores, values and the softmax's sums, which are matrix products on CPU.
    attention = (4 * c.head_dim + 2) * rows * c.num_heads * width**2 * c.num_layers
    assert flops(model, moved) == once + attention
    assert flops(model, dataclasses.replace(moved, visual_slots=None)) == 2 * once + attention


def test_decoding_touches_no_visual_weight() -> None:
    model, config, _, _ = golden_case(CASE)
    c, (_, batch) = config.language, case()
    logits, state = jax.jit(prefill, static_argnums=2)(model, batch, 64)
    tokens = jnp.argmax(logits, -1)
    expected, _ = jax.jit(decode)(model, tokens, state)
    params = get_params(model)
    for name, value in params.items():
        if "/visual/" in name or name.startswith("vision/"):
            params[name] = np.full_like(value, np.nan)
    set_params(model, params)
    got, _ = jax.jit(decode)(model, tokens, state)
    np.testing.assert_array_equal(got, expected)
    projections = 2 * len(tokens) * (
        expert_size(c) * c.num_layers + c.vocab_size * c.hidden_size
    )  # fmt: skip
    attention = (4 * c.head_dim + 2) * len(tokens) * c.num_heads * 64 * c.num_layers
    assert dot_flops(decode, model, tokens, state) == projections + attention


def test_text_alone_runs_on_one_expert() -> None:
    model, config, _, _ = golden_case(CASE)
    batch = FAMILY.collate(config, [FAMILY.example_prompt(config, 9, 0)])
    moved, _ = arrange(batch)
    assert moved.visual_slots == 0
    whole = jax.tree.map(jnp.asarray, batch)
    assert dot_flops(lambda m, b: m(b), model, whole) < dot_flops(
        lambda m, b: m.language.logits(
            m.language(
                m.embed(b), b.positions, b.order, b.token_class, visual=b.token_class == VISUAL
            )
        ),
        model,
        whole,
    )


@pytest.fixture(scope="module")
def quantised():
    config, batch = case()
    params, report = quantize_params(FAMILY, config, W8A8, golden_params(CASE), batch)
    model = abstract_model(FAMILY, config, W8A8)
    set_params(model, dict(params))
    return model, batch, params, report


def test_quantised_layouts_agree(quantised) -> None:
    """With static scales of both experts and a sink."""
    model, batch, _, _ = quantised
    moved, columns = arrange(batch)
    expected = np.asarray(forward(model, batch))
    got = np.asarray(restore(forward(model, moved), columns, batch.order.shape[1]))
    real = batch.order >= 0
    assert relative(got[real], expected[real]) < FLIPS
    assert relative(expected[real], golden(*CASE.split("/"))[2]["logits"][real]) < 0.1


def test_a_visual_sink_stays_with_its_expert(quantised) -> None:
    """A visual sink uses the sink's scale but the visual expert."""
    model, batch, params, _ = quantised
    marked = dict(params) | {"language/sinks/positions": np.array([0, 1, -1, -1], np.int32)}
    model = abstract_model(FAMILY, model.config, W8A8)
    set_params(model, marked)
    classes = model.language.classes(batch.input_ids, batch.order, batch.token_class)
    sinks = np.asarray(classes == SINK)
    assert (sinks & (batch.token_class == VISUAL)).any()
    moved, columns = arrange(batch)
    got = np.asarray(restore(forward(model, moved), columns, batch.order.shape[1]))
    real = batch.order >= 0
    expected = np.asarray(forward(model, batch))
    assert relative(got[real], expected[real]) < FLIPS
    assert relative(expected[real], golden(*CASE.split("/"))[2]["logits"][real]) < 0.3


def test_points_are_calibrated_on_their_own_tokens(quantised) -> None:
    _, _, _, report = quantised
    for point in ("attn_in", "attn_out", "mlp_in", "mlp_hidden"):
        seen = report["points"]
        assert set(seen[f"language/layers/0/{point}"]) == {"text", "sink"}
        assert set(seen[f"language/layers/1/visual/{point}"]) == {"visual"}


def test_hessians_count_their_own_tokens(monkeypatch) -> None:
    """Each Hessian of the decoder's layers sums only the tokens of its expert."""
    config, batch = case()
    counts: dict[str, int] = {}
    watch, add = sequential.Quantiser._watch, sequential.accumulate

    def watching(self, work, point, with_hessian):
        def counting(hessian, x, weight, *rest):
            key = f"{work.part.name}/{point}"
            counts[key] = counts.get(key, 0) + int((np.asarray(weight) > 0).sum())
            return add(hessian, x, weight, *rest)

        monkeypatch.setattr(sequential, "accumulate", counting)
        return watch(self, work, point, with_hessian)

    monkeypatch.setattr(sequential.Quantiser, "_watch", watching)
    recipe = Recipe("gptq", language=Section(4), weights=Weights(method="gptq"))
    quantize_params(FAMILY, config, recipe, golden_params(CASE), batch)
    visual = int((batch.token_class == VISUAL).sum())
    text = int((batch.token_class == 0).sum())
    for name, count in counts.items():
        assert count == (visual if "/visual/" in name else text), name
    assert len(counts) == 2 * 8


def test_smoothing_moves_both_experts_together() -> None:
    """Both experts share the stream and the attention, so smoothing scales the same channels in
    both."""
    config, batch = case()
    params = golden_params(CASE)
    recipe = dataclasses.replace(METHODS["smoothquant"], vision=Section(), connector=Section())
    look = looked(FAMILY, config, params, batch)
    smooth, chosen = smooth_params(params, FAMILY.streams(config), recipe, look)
    assert {n.rpartition("/")[2] for n in chosen} == {"q_proj", "gate_proj", "o_proj", "down_proj"}
    joint = {n: a for n, a in chosen.items() if "down_proj" not in n}
    assert len(joint) == 3 * 2 and any(joint.values())
    for name, alpha in joint.items():
        block, _, layer = name.rpartition("/")
        for path in (name, f"{block}/visual/{layer}"):
            new, old = smooth[f"{path}/kernel"].load(), params[f"{path}/kernel"]
            moved = relative(new, old) > 1e-6
            assert moved == (alpha > 0), path
    got = np.asarray(forward(float_model(FAMILY, config, Recipe(), smooth), batch))
    real = batch.order >= 0
    assert relative(got[real], golden(*CASE.split("/"))[2]["logits"][real]) < 1e-5
    tokens = look.tokens["language/layers/0/visual/attn_in"]
    np.testing.assert_array_equal(np.isnan(tokens), (batch.token_class != VISUAL).ravel())


def test_experts_are_inspected_by_name() -> None:
    """``dynamic_points`` applies to both experts."""
    section = dataclasses.replace(PRESETS["w4a8"].language, dynamic_points=("mlp_hidden",))
    assert section.mode("visual/mlp_hidden") == "dynamic" and section.mode("mlp_in") == "static"


def test_scales_of_both_experts_are_learned(quantised) -> None:
    model, batch, params, _ = quantised
    student = abstract_model(FAMILY, model.config, W8A8)
    set_params(student, dict(params))
    teacher = float_model(FAMILY, model.config, Recipe(), golden_params(CASE))
    plan = Tuning(epochs=1)
    learned, report = tune(student, teacher, [batch], plan, no_progress)
    assert np.isfinite(list(report.values())).all()
    for path in ("language/layers/0/up_proj", "language/layers/0/visual/up_proj"):
        assert relative(learned[f"{path}/kernel"], params[f"{path}/kernel"].scale) > 1e-6
