"""Calibration and rounding: statistics, scales and the remaining error."""

import dataclasses

import numpy as np
import pytest

from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.nn.params import get_params
from mquant_jax.numerics import QWeight, quantize_weight
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.observe import Histogram
from mquant_jax.ptq.pipeline import Conversion, quantize_params
from mquant_jax.ptq.scales import clip_search, mse_clip
from mquant_jax.ptq.sequential import Quantiser
from mquant_jax.recipe import Calibration, Recipe, Section, Weights
from tests.helpers import golden_qwen2_vl, quantised, relative


@pytest.fixture(scope="module")
def golden():
    model, config, inputs, outputs = golden_qwen2_vl("public")
    batch = FAMILY.reference_batch(config, inputs)
    return model, config, batch, inputs["attention_mask"] == 1, outputs["logits"]


_CACHE: dict[Recipe, tuple] = {}


def quantised_logits(golden, recipe: Recipe):
    """Logits of the golden quantised by ``recipe``, its tensors, and the report (cached)."""
    if recipe not in _CACHE:
        _CACHE[recipe] = _quantised_logits(golden, recipe)
    return _CACHE[recipe]


def _quantised_logits(golden, recipe: Recipe):
    model, config, batch, real, _ = golden
    params, report = quantize_params(FAMILY, config, recipe, get_params(model), batch)
    return quantised(FAMILY, config, recipe, params, batch)[real], params, report


def walked(golden, recipe: Recipe, batches) -> Quantiser:
    """A quantiser that has walked the golden's float model; its results are not stored."""
    model, config, _, _, _ = golden
    job = Conversion(FAMILY, config, recipe, get_params(model), batches)
    quantiser = Quantiser(job.target, recipe, {}, job.states, lambda *_: {})
    job.walk("round", recipe, quantiser)
    return quantiser


def test_every_point_is_seen_and_padding_is_not(golden) -> None:
    _, config, batch, _, _ = golden
    report = quantised_logits(golden, PRESETS["w4a8"])[2]["points"]
    blocks = config.vision.num_layers + config.language.num_layers
    assert len(report) == 4 * blocks + 4  # patch embedding, two in the merger, head
    recipe = Recipe(language=Section(16, None, "static"))
    counts: dict[str, list[float]] = {}
    watch = Quantiser._watch

    def watching(self, work, point, with_hessian):
        seen = watch(self, work, point, with_hessian)
        counts[f"{work.part.name}/{point}"] = [h.counts.sum() for h in seen.hists]
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantiser, "_watch", watching)
        walked(golden, recipe, batch)
    width = config.language.hidden_size
    tokens = [(batch.token_class == c).sum() for c in range(2)]
    assert counts["language/layers/0/attn_in"] == [*(n * width for n in tokens), 0]


def test_chunks_are_calibrated_as_one_batch_is(golden) -> None:
    """Calibration in one batch or several, with any padding, gives the same scales and weights."""
    _, config, _, _, _ = golden
    prompts = [FAMILY.example_prompt(config, n, side) for n, side in ((9, 56), (7, 0))]
    recipe = dataclasses.replace(PRESETS["w8a8"], calibration=Calibration(observer="minmax"))
    params = get_params(golden[0])
    together, _ = quantize_params(FAMILY, config, recipe, params, FAMILY.collate(config, prompts))
    apart = [FAMILY.collate(config, [p]) for p in prompts]
    alone, _ = quantize_params(FAMILY, config, recipe, params, apart)
    for name, value in together.items():
        if name.endswith("act_scale"):
            np.testing.assert_allclose(alone[name], value, rtol=0.1, err_msg=name)
        if name.endswith("kernel"):
            changed = np.mean(alone[name].unpacked().values != value.unpacked().values)
            assert changed < 0.05, name


@pytest.mark.parametrize(("name", "error"), [("w8a8", 0.12), ("w4a8-rtn", 0.6), ("w4a8", 0.45)])
def test_error_of_presets_on_random_weights(golden, name, error) -> None:
    # Random weights are the worst case for rounding; benchmarks measure trained ones.
    logits, _, _ = quantised_logits(golden, PRESETS[name])
    assert relative(logits, golden[4][golden[3]]) < error


def test_8_bits_static_cost_little_beside_8_bits_dynamic(golden) -> None:
    expected = golden[4][golden[3]]
    static = relative(quantised_logits(golden, PRESETS["w8a8"])[0], expected)
    sections = {s: Section(8, None, "dynamic") for s in ("vision", "connector", "language")}
    dynamic = relative(quantised_logits(golden, Recipe("w8a8-dynamic", **sections))[0], expected)
    assert static < 3 * dynamic


def test_each_modality_has_its_own_scale(golden) -> None:
    recipe = dataclasses.replace(PRESETS["w8a8"], modality_scales=False, sink_class=False)
    shared = quantised_logits(golden, recipe)[1]
    own = quantised_logits(golden, PRESETS["w8a8"])[1]
    name = "language/layers/1/mlp_hidden/act_scale"
    assert own[name].shape == (3,) and len(set(own[name])) == 3
    assert shared[name].shape == (1,)
    assert own["vision/layers/0/attn_in/act_scale"].shape == (1,)


def test_everything_the_recipe_names_is_quantised(golden) -> None:
    _, params, report = quantised_logits(golden, PRESETS["w4a8"])
    floats = [n for n, v in params.items() if n.endswith("kernel") and not isinstance(v, QWeight)]
    assert not floats
    assert params["language/head/kernel"].bits == 8
    assert params["vision/patch_embed/proj/kernel"].bits == 4
    assert 0 < report["weights"]["vision/merger/fc1/kernel"] < 0.2
    seen = report["points"]
    assert set(seen["vision/merger/merger_in"]) == {"text"}
    assert set(seen["language/layers/0/attn_in"]) == {"text", "visual", "sink"}
    figures = {"amax", "rms", "clip", "clipped", "error"}
    assert set(seen["language/layers/0/attn_in"]["sink"]) == figures


def test_group_scales_lower_the_weight_error(golden) -> None:
    coarse = quantised_logits(golden, Recipe("c", language=Section(4, None, "none")))[2]["weights"]
    fine = Recipe("g16", language=Section(4, 16, "none"))
    finer = quantised_logits(golden, fine)[2]["weights"]
    assert all(finer[name] < coarse[name] for name in finer)


def test_static_scales_need_pictures(golden) -> None:
    model, config, batch, _, _ = golden
    text = dataclasses.replace(
        batch, token_class=np.minimum(batch.token_class, 0), vision=None
    )  # fmt: skip
    with pytest.raises(UserError, match="no visual tokens"):
        quantize_params(FAMILY, config, PRESETS["w4a8"], get_params(model), text)
    for name in ("w4a8-rtn", "w4a16"):
        with pytest.raises(UserError, match="needs calibration data"):
            quantize_params(FAMILY, config, PRESETS[name], get_params(model), None)


def test_the_histogram_follows_growing_ranges() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=1000) * s for s in (1e-3, 1.0, 50.0)]
    hist = Histogram()
    for part in parts:
        hist.add(part)
    values = np.abs(np.concatenate(parts))
    assert hist.counts.sum() == values.size and hist.amax == values.max()
    above = hist.counts[hist.centres() > 10].sum()
    assert abs(above - (values > 10).sum()) <= 5
    both = Histogram.merged([hist, hist])
    assert both.counts.sum() == 2 * values.size and both.amax == hist.amax


def test_the_clip_ignores_one_far_outlier_and_keeps_a_plain_range() -> None:
    rng = np.random.default_rng(1)
    plain = rng.uniform(-1, 1, 1_000_000)
    hist = Histogram()
    hist.add(plain)
    assert mse_clip(hist) > 0.95
    hist.add(np.array([8.0]))
    assert mse_clip(hist) < 2.0


def test_the_clip_search_never_raises_the_error() -> None:
    w = np.asarray(np.random.default_rng(2).standard_t(3, (16, 64)), np.float32)
    for group in (None, 16):
        plain = quantize_weight(w, 4, group).dequantize()
        searched = quantize_weight(w, 4, group, clip_search(w, 4, group)).dequantize()
        error = [(np.abs(w - np.asarray(q)) ** 2.4).sum() for q in (plain, searched)]
        assert error[1] < error[0]


def test_a_tied_table_is_quantised_once_for_lookup_and_head(golden) -> None:
    model, config, batch, real, _ = golden
    tied = dataclasses.replace(
        config, language=dataclasses.replace(config.language, tied_head=True)
    )
    params = get_params(model)
    del params["language/head/kernel"]
    recipe = Recipe("head8", head=Section(8, None, "static"))
    logits = []
    for r in (Recipe(), recipe):
        out, _ = quantize_params(FAMILY, tied, r, params, batch)
        logits.append(quantised(FAMILY, tied, r, out, batch)[real])
    assert out["language/embedding"].bits == 8 and out["language/head_in/act_scale"].shape == (1,)
    assert 0 < relative(logits[1], logits[0]) < 0.05


def test_the_gptq_recipe_beats_rounding_on_the_golden(golden) -> None:
    # Random weights and two prompts: this tests the mechanism, not the gain.
    expected = golden[4][golden[3]]
    nearest = relative(quantised_logits(golden, PRESETS["w4a8-rtn"])[0], expected)
    recipe = dataclasses.replace(PRESETS["w4a8-rtn"], weights=Weights(method="gptq"))
    assert relative(quantised_logits(golden, recipe)[0], expected) < 0.7 * nearest
