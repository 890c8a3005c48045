"""Checks shared by the tests of several families."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import mquant_jax as mq
from convert import hf_to_flax, verify
from mquant_jax.models.base import VLM, Batch, Family, Prompt, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import abstract_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import quantize_params
from mquant_jax.recipe import Recipe
from tests.family_cases import batch_of
from tests.helpers import GOLDENS, Arrays, forward, golden, quantised, relative

RTOL = 1e-5  # float32 noise of a few layers; families measure 8e-7 to 2.5e-6
# Quantised layers around the resampler that MiniCPM-V and Qwen-VL share, with the patch embedding.
RESAMPLER_WEIGHTS = (
    "keys/kv_proj", "keys/k_proj", "keys/v_proj", "queries/q_proj", "merger/out_proj",
    "merger/proj", "patch_embed/proj",
)  # fmt: skip
RESAMPLER_POINTS = ("keys/kv_in", "keys/k_in", "keys/v_in", "queries/q_in", "merger/proj_in")
_prefill = jax.jit(lambda model, batch, cache: model.prefill(batch, cache))
_decode = jax.jit(lambda model, *args: model.decode(*args))
_embed = jax.jit(lambda model, batch: model.embed(batch))


def verified(folder: Path, dst: Path, capsys: Any, rtol: float = RTOL) -> set[str]:
    """Convert and verify from the command line; all greedy tokens must match.

    Returns:
        Names of the arrays that agree with the reference in ``folder``.
    """
    assert hf_to_flax.main([str(folder), str(dst)]) == 0
    capsys.readouterr()
    args = [str(dst), "--reference", str(folder), "--rtol", str(rtol), "--json"]
    assert verify.main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["greedy_match"] == 1.0
    return set(result["arrays"])


def unused_tensors(case: str) -> set[str]:
    """Names of the tensors in a golden's checkpoint that the family ignores.

    Checks that all others are used completely: the inverted rules restore them.
    """
    hf = golden(*case.split("/"))[0]
    family = family_for(hf)
    rules = family.weight_rules(family.config_from_hf(hf))
    source = load_file(GOLDENS / case / "model.safetensors")
    ignored = {name for name in source if family.ignored(name)}
    out = {r.src: np.full(r.src_shape, np.nan) for r in rules}
    assert set(out) == set(source) - ignored
    for rule in rules:
        rule.scatter(rule.apply(source[rule.src]), out[rule.src])
    for name, value in out.items():
        np.testing.assert_array_equal(value, source[name])
    return ignored


def rows_stand_alone(
    model: VLM, collate: Callable[..., Batch], prompts: Sequence[Prompt], pad_to: int | None = None
) -> None:
    """Check that the logits of a prompt depend neither on the rest of its batch nor on padding.

    ``collate``: ``(prompts, pad_to=) -> Batch``.
    """
    together = forward(model, collate(prompts, pad_to=pad_to))
    for row, prompt in enumerate(prompts):
        n = len(prompt.input_ids)
        alone = forward(model, collate([prompt]))
        assert relative(alone[0, -n:], together[row, -n:]) < RTOL


def cached_logits(model: VLM, batch: Batch, tokens: np.ndarray) -> np.ndarray:
    """Logits ``[B, steps, vocab]`` that predict each of the given tokens, by cached decoding."""
    rows, width = batch.input_ids.shape
    cache = model.language.init_cache(rows, width + tokens.shape[1] + 3)  # three spare slots
    logits, cache = _prefill(model, batch, cache)
    out = [logits]
    order, position = np.asarray(batch.lengths), np.asarray(batch.next_position)
    for i, token in enumerate(tokens.T[:-1]):
        logits, cache = _decode(model, token, order + i, position + i, cache)
        out.append(logits)
    return np.stack(out, axis=1)


def greedy_with_the_cache(model: VLM, batch: Batch, outputs: Arrays) -> np.ndarray:
    """Check cached decoding against a golden's greedy tokens and logits; return our logits."""
    got, expected = cached_logits(model, batch, outputs["greedy"]), outputs["greedy_logits"]
    for i in range(expected.shape[1]):
        assert relative(got[:, i], expected[:, i]) < RTOL
    np.testing.assert_array_equal(np.argmax(got, -1), outputs["greedy"])
    return got


def wider_than_bfloat16(family: Family, config: Any, case: str) -> set[str]:
    """Names of the tensors and steps of a bfloat16 model that have another dtype."""
    model = abstract_model(family, config, Recipe(), jnp.bfloat16)
    held = {name: value.dtype for name, value in abstract_params(model).items()}
    batch = batch_of(family, config, case)
    for step in ("embed", "stream"):
        held[step] = jax.eval_shape(lambda m, b, s=step: getattr(m, s)(b), model, batch).dtype
    return {name for name, dtype in held.items() if dtype != jnp.bfloat16}


def example_prompt(family: Family, config: Any, model: VLM, side: int) -> Prompt:
    """A synthetic prompt with a picture, which needs no tokenizer. Checks that it can be embedded
    in one batch with a text-only prompt."""
    prompt = family.example_prompt(config, 10, side)
    batch = family.collate(config, [prompt, family.example_prompt(config, 7, 0)])
    assert np.isfinite(_embed(model, batch)).all()
    return prompt


def w4a8_error(
    family: Family, config: Any, params: Arrays, case: str
) -> tuple[float, dict[str, Any]]:
    """Relative error of W4A8 logits, calibrated on the golden's own prompts, and the report."""
    batch, recipe = batch_of(family, config, case), PRESETS["w4a8"]
    real = np.asarray(batch.token_class) >= 0
    made, report = quantize_params(family, config, recipe, params, batch)
    got = quantised(family, config, recipe, made, batch)[real]
    assert np.isfinite(got).all()
    return relative(got, golden(*case.split("/"))[2]["logits"][real]), report


def drawn(tokenizer: Any, ids: list[int], visual: int, n: int) -> str:
    """A prompt's text with one star for each run of ``n`` ids ``visual``."""
    out, i = "", 0
    while i < len(ids):
        picture = ids[i : i + n] == [visual] * n
        out += "*" if picture else tokenizer.decode([ids[i]])
        i += n if picture else 1
    return out


def cheap_w4a8(folder: Path, **changes: Any) -> Path:
    """A recipe file: the W4A8 preset with few samples and round-to-nearest weights."""
    recipe = PRESETS["w4a8"].to_json() | changes
    recipe["calibration"]["max_samples"] = 3
    recipe["weights"]["method"] = "rtn"
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def answers(folder: Path, pictures: list[np.ndarray], tokens: int = 2) -> None:
    """Check that a checkpoint answers, in one batch, a question about pictures and a text-only
    one."""
    model = mq.load(folder)
    got = model.generate([pictures, []], ["What?", "Text alone"], max_new_tokens=tokens)
    assert len(got) == 2 and all(isinstance(text, str) for text in got)
