"""Several questions about one picture: packing them changes no answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import picture_questions
from benchmarks.picture_questions import Asked, greedy, groups, reference, scores
from mquant_jax.models.base import Prompt, abstract_model
from mquant_jax.models.squares import patchify
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Recipe, Section
from mquant_jax.runtime.generate import Generator
from tests.helpers import golden_model
from tests.llava_cases import CLIP, DINOV2

TOKENS = 3  # per answer, including the stop token


def prompts_of(config, inputs) -> list[Prompt]:
    """Two pictures with three questions of different lengths each."""
    token, rng = config.image_token_id, np.random.default_rng(0)
    out = []
    tokens, side = config.image_tokens, config.vision.position_grid
    for picture in patchify(inputs["pixel_values"], config.patch_size)[:2]:
        for length in (3, 7, 4):
            ids = [5, 6, *[token] * tokens, *rng.integers(10, 300, length).tolist()]
            out.append(Prompt(ids, [(1, side, side)], picture))
    return out


def questions_of(prompts: list[Prompt], answers: list[list[int]], token: int) -> list[Asked]:
    out = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        at = len(prompt.input_ids) - prompt.input_ids[::-1].index(token)
        front = dataclasses.replace(prompt, input_ids=prompt.input_ids[:at])
        out.append(Asked(front, tuple(prompt.input_ids[at:]), tuple(answer), i // 3))
    return out


def quantised_model(family, model, config, batch):
    """W4A8 with one activation scale per token class."""
    recipe = dataclasses.replace(
        PRESETS["w4a8"], head=Section(), rotate=False, balance=False,
        weights=Recipe().weights, modality_scales=True,
    )  # fmt: skip
    config, params = untied(config, get_params(model))
    made = abstract_model(family, config, recipe)
    set_params(made, quantize_params(family, config, recipe, params, batch)[0])
    return made


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (CLIP, "float"),
        (DINOV2, "float"),
        pytest.param(CLIP, "w4a8", marks=pytest.mark.slow),
    ],
)
def test_packed_answers_are_those_of_generation(case, kind, monkeypatch) -> None:
    monkeypatch.setattr(picture_questions, "PICTURES", 2)
    monkeypatch.setattr(picture_questions, "QUESTIONS", 4)  # the last group is not full
    family, model, config, inputs, _ = golden_model(case)
    prompts = prompts_of(config, inputs)

    def collate(rows):
        return family.collate(config, rows)

    if kind == "w4a8":
        model = quantised_model(family, model, config, collate(prompts))
    answers = Generator(model, (-1,)).generate(collate(prompts), TOKENS).tokens
    wrong = [1, 4]
    asked = [list(a) for a in answers]
    for i in wrong:
        asked[i][i % TOKENS] += 1
    packed = list(groups(questions_of(prompts, asked, config.image_token_id), collate))
    assert len(packed) == 2 and {g.ids.shape for g in packed} == {(4, 7 + TOKENS - 1)}
    found = scores(model, packed, reference(model, packed))
    assert found.right.tolist() == [i not in wrong for i in range(6)]
    assert found.agreeing.tolist() == [TOKENS] * 6
    np.testing.assert_allclose(found.kl, 0, atol=1e-5)
    questions = questions_of(prompts, asked, config.image_token_id)
    own = greedy(model, questions, collate, stop=-1, most=TOKENS)
    assert [list(q.answer) for q in own] == [list(a) for a in answers]
    stop = answers[0][1]
    own = greedy(model, questions[:1], collate, stop, most=TOKENS)
    assert list(own[0].answer) == list(answers[0][: answers[0].index(stop) + 1])


@pytest.mark.slow
def test_divergence_is_that_of_whole_prompts() -> None:
    family, model, config, inputs, _ = golden_model(CLIP)
    prompts = prompts_of(config, inputs)
    other = quantised_model(family, model, config, family.collate(config, prompts))
    asked = questions_of(prompts, [[20, 21, 22]] * 6, config.image_token_id)
    packed = list(groups(asked, lambda rows: family.collate(config, rows)))
    found = scores(other, packed, reference(model, packed))
    for i, (prompt, question) in enumerate(zip(prompts, asked, strict=True)):
        fed = dataclasses.replace(prompt, input_ids=[*prompt.input_ids, *question.answer[:-1]])
        batch = family.collate(config, [fed])
        p, q = (np.asarray(m(batch), np.float64)[0, -TOKENS:] for m in (model, other))
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        np.testing.assert_allclose(
            found.kl[i], (np.exp(log_p) * (log_p - log_q)).sum(), rtol=0.02, atol=1e-4
        )
        assert found.agreeing[i] == (p.argmax(-1) == q.argmax(-1)).sum()
