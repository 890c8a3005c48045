"""Warnings about calibration data that is unsuitable for the model."""

from __future__ import annotations

import dataclasses

from mquant_jax.files import read_json
from mquant_jax.models.base import abstract_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.models.text import collate, text_prompt
from mquant_jax.nn.params import dense_layers
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.calibration_data import (
    Chunks,
    warn_of_bundled,
    warn_of_few,
    warn_of_little_text,
)
from mquant_jax.recipe import Section
from mquant_jax.samples import DEMO_ASSETS

CONFIG = read_json(DEMO_ASSETS / "model" / "config.json")  # 512 inputs, 576 in the tower's MLPs


def few(capsys, recipe, samples: int, tokens: int, patches: int) -> str:
    model = abstract_model(FAMILY, FAMILY.config_from_hf(CONFIG), recipe)
    warn_of_few(Chunks([], "", samples, tokens, patches), dense_layers(model), recipe)
    return capsys.readouterr().err


def test_fewer_rows_than_inputs(capsys) -> None:
    w4a8 = PRESETS["w4a8"]
    assert few(capsys, w4a8, 64, 5000, 9000) == ""
    text = few(capsys, w4a8, 10, 200, 9000)
    assert "200 tokens in 10 samples" in text
    assert "512 inputs of language/layers/*/down_proj; 26 samples like these suffice" in text
    assert text.count("warning:") == 1
    assert "100 patches in 10 samples" in few(capsys, w4a8, 10, 5000, 100)
    assert few(capsys, w4a8, 10, 200, 0).count("warning:") == 2
    # Neither round-to-nearest nor float layers need a Hessian.
    assert few(capsys, PRESETS["w8a8"], 10, 200, 100) == ""
    tower = dataclasses.replace(w4a8, vision=Section(), connector=Section())
    assert "patches" not in few(capsys, tower, 10, 200, 100)


def test_little_text_to_learn_from(capsys) -> None:
    batch = collate([text_prompt(range(40)), text_prompt(range(60))])
    chunks = Chunks([batch, batch], "", 4, 200, 0)
    warn_of_little_text(chunks, PRESETS["w4a8-tuned"])
    assert "200 text tokens in 4 samples; below 4096" in capsys.readouterr().err
    warn_of_little_text(chunks, PRESETS["w4a8"])
    enough = dataclasses.replace(chunks, batches=[batch] * 41)
    warn_of_little_text(enough, PRESETS["w4a8-tuned"])
    assert capsys.readouterr().err == ""


def test_the_bundled_set_for_another_model(capsys, tmp_path) -> None:
    warn_of_bundled(tmp_path, CONFIG)
    assert capsys.readouterr().err == ""
    warn_of_bundled(tmp_path, CONFIG | {"num_hidden_layers": 2})
    text = capsys.readouterr().err
    assert f"NO --calibration FOR {tmp_path}" in text and "--calibration FILE.jsonl" in text
