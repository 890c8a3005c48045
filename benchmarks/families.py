"""Compare all model families: parity with the original code, and accuracy of each method.

    python -m benchmarks.families [--case NAME] [--json] [--save FILE] [--docs FILE]

For each golden case in tests/goldens:

``float``     relative logits error against the original code's output, and greedy tokens
``rotated``   the same model with fused norms and all rotations folded in, against float
``rtn``, ``quarot``, ``mquant``   W4A8 static: relative logits error against float, for a model of
              the same structure widened to at least 512 channels, with random weights and channels
              made 10 to 100 times larger than the rest without a change of function
              (benchmarks/outliers.py), on the case's prompts with random text and pictures

Calibration uses other random prompts than the evaluation. Random weights have no redundancy:
compare the columns with each other, and do not read them as the loss of a trained model. ``--docs``
writes a Markdown file with the table and what each family supports.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from benchmarks.outliers import with_outliers
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch, Family, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import Params, set_params
from mquant_jax.presets import METHODS
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Recipe, Tuning
from mquant_jax.runtime.generate import Generator

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
COMPARED = ("rtn", "quarot", "mquant")
CALIBRATION = 16  # prompts, each of 40 text tokens and a picture
_VIT = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
_EVA = {"hidden_size": 512, "intermediate_size": 1536, "num_heads": 8}
_LLM = {
    "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
# Case -> changes to its config.json; dictionaries are merged.
WIDE: dict[str, dict[str, Any]] = {
    "qwen2_vl/public": _LLM | {
        "rope_scaling": {"mrope_section": [8, 12, 12]},
        "vision_config": {"embed_dim": 512, "num_heads": 8, "hidden_size": 512},
    },
    "qwen2_5_vl/public": _LLM | {
        "rope_scaling": {"mrope_section": [8, 12, 12]},
        "vision_config": {
            "hidden_size": 512, "intermediate_size": 1368, "num_heads": 8, "out_hidden_size": 512,
        },
    },
    "qwen3_vl/public": {
        "text_config": _LLM | {
            "head_dim": 64, "rope_scaling": {"mrope_section": [12, 10, 10]},
        },
        "vision_config": {
            "hidden_size": 512, "intermediate_size": 1536, "num_heads": 8, "out_hidden_size": 512,
        },
    },
    "internvl2/public": {"llm_config": _LLM, "vision_config": _VIT},
    "internvl/public": {"text_config": _LLM | {"head_dim": 64}, "vision_config": _VIT},
    "llava/public": {"text_config": _LLM, "vision_config": _VIT},
    "llava/public_dinov2": {"text_config": _LLM, "vision_config": _VIT | {"mlp_ratio": 3}},
    "minicpmv2_6/public": _LLM | {
        "vision_config": _VIT | {"hidden_size": 576, "intermediate_size": 1080},
    },
    "qwen_vl/public": {
        "hidden_size": 512, "intermediate_size": 2816, "num_attention_heads": 8,
        "kv_channels": 64, "visual": {"width": 576, "heads": 8, "output_dim": 512},
    },
    "glm4v/public": {
        "hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8,
        "kv_channels": 64, "multi_query_group_num": 2, "vision_config": _EVA,
    },
    "cogvlm2/public": {
        "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
        "num_multi_query_heads": 2, "vision_config": _EVA,
    },
}  # fmt: skip


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with ``changes`` applied: dictionaries are merged, other values replaced."""
    out = dict(config)
    for key, value in changes.items():
        known = out.get(key)
        out[key] = merged(known, value) if isinstance(value, dict) and known else value
    return out


def random_params(family: Family, config: Any, seed: int) -> Params:
    """Return random weights of a well-conditioned model: each layer adds a little to the residual
    stream, as in trained models, and norms and biases are not trivial."""
    rng = np.random.default_rng(seed)
    out: Params = {}
    for rule in family.weight_rules(config):
        value = rng.standard_normal(rule.shape)
        if rule.dst.endswith("norm/weight"):
            value = np.exp(0.2 * value)
        elif rule.dst.endswith("frequencies"):
            value = 1e4 ** -(np.arange(rule.shape[0]) / rule.shape[0])
        elif rule.dst.endswith("kernel") and len(rule.shape) == 2:
            value *= 0.5 * rule.shape[1] ** -0.5
        elif not rule.dst.endswith("embedding"):
            value *= 0.1
        out[rule.dst] = value.astype(np.float32)
    return out


def other_content(batch: Batch, vocab: int, seed: int) -> Batch:
    """Return the batch with the same layout but random text and pictures."""
    rng = np.random.default_rng(seed)
    text = np.asarray(batch.token_class) == 0
    ids = np.where(text, rng.integers(0, vocab, text.shape), batch.input_ids).astype(np.int32)
    vision = batch.vision
    if vision is not None:
        noise = rng.standard_normal(vision.patches.shape).astype(np.float32)
        vision = dataclasses.replace(vision, patches=noise)
    return dataclasses.replace(batch, input_ids=ids, vision=vision)


def logits(family: Family, config: Any, recipe: Recipe, params: Params, batch: Batch):
    """Return the logits of the model that ``recipe`` describes, float32 ``[real tokens,
    vocab]``."""
    model = abstract_model(family, config, recipe)
    set_params(model, dict(params))
    real = np.asarray(batch.token_class) >= 0
    return np.asarray(jax.jit(lambda m, b: m(b))(model, batch))[real]


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Return ``||got - expected|| / ||expected||``."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def parity(case: str) -> dict[str, Any]:
    """Run the golden case in float, and rotated in float."""
    hf = json.loads((GOLDENS / case / "config.json").read_text(encoding="utf-8"))
    family = family_for(hf, case)
    config = family.config_from_hf(hf)
    arrays = {n: load_file(GOLDENS / case / f"{n}.safetensors")
              for n in ("model", "inputs", "outputs")}  # fmt: skip
    rules = family.weight_rules(config)
    params = {r.dst: r.apply(arrays["model"][r.src]) for r in rules}
    batch = family.reference_batch(config, arrays["inputs"])
    model = abstract_model(family, config, Recipe())
    set_params(model, dict(params))
    greedy = arrays["outputs"]["greedy"]
    answers = np.asarray(Generator(model, (-1,)).generate(batch, greedy.shape[1]).tokens)
    plain = logits(family, config, Recipe(), params, batch)
    reference = arrays["outputs"]["logits"]
    if reference.shape[:2] == batch.order.shape:
        reference = reference[np.asarray(batch.token_class) >= 0]
    rotating = Recipe(rotate=True)
    config, params = untied(config, params)
    turned = quantize_params(family, config, rotating, params)[0]
    return {
        "family": family.name,
        "pictures": {None: "any number"}.get(family.most_pictures, str(family.most_pictures)),
        "videos": "yes" if family.videos else "no",
        "rows_in_case": int(batch.order.shape[0]),
        "float": error(plain, reference.reshape(plain.shape)),
        "greedy_equal": bool((answers == greedy).all()),
        "rotated": error(logits(family, config, rotating, turned, batch), plain),
    }


def widened(case: str) -> dict[str, float]:
    """Return the relative logits error of every method on the widened case."""
    hf = json.loads((GOLDENS / case / "config.json").read_text(encoding="utf-8"))
    hf = merged(hf, WIDE[case])
    family = family_for(hf, case)
    config = family.config_from_hf(hf)
    inputs = load_file(GOLDENS / case / "inputs.safetensors")
    batch = family.reference_batch(config, inputs)
    config, params = untied(config, random_params(family, config, 0))
    vocab = config.language.vocab_size
    batch = other_content(batch, vocab, 2)
    plain = logits(family, config, Recipe(), params, batch)
    params = with_outliers(params, family.streams(config), 0)
    prompts = [family.example_prompt(config, 40, 56)] * CALIBRATION
    calibration = other_content(family.collate(config, prompts), vocab, 1)
    out = {"outliers": error(logits(family, config, Recipe(), params, batch), plain)}
    for name in progress(COMPARED, case):
        # A random model's predictions carry no information to learn scales from.
        recipe = dataclasses.replace(METHODS[name], tune=Tuning())
        made = quantize_params(family, config, recipe, params, calibration)[0]
        out[name] = error(logits(family, config, recipe, made, batch), plain)
    return out


def status(row: dict[str, Any]) -> str:
    """Return ``complete`` if every figure of the row is within its bound, else the names of the
    rest."""
    wrong = {
        "float": row["float"] > 1e-4 or not row["greedy_equal"],
        "rotated": row["rotated"] > 1e-3,
        "W4A8": row["mquant"] >= row["rtn"],
    }
    return ", ".join(f"**{name}**" for name, bad in wrong.items() if bad) or "complete"


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| case | pictures per prompt | videos | batch | float | greedy | rotated | rtn | quarot "
        "| mquant | status |",
        "|---" * 11 + "|",
    ]
    for r in rows:
        greedy = "equal" if r["greedy_equal"] else "**differs**"
        costs = " | ".join(f"{r[name]:.3f}" for name in COMPARED)
        lines.append(
            f"| {r['case']} | {r['pictures']} | {r['videos']} | ragged, {r['rows_in_case']} tried "
            f"| {r['float']:.1e} | {greedy} | {r['rotated']:.1e} | {costs} | {status(r)} |"
        )
    return "\n".join(lines)


DOCS = """# Families

Written by `python -m benchmarks.families --docs docs/families.md`; do not edit.

`float`: relative error of the logits against the original code's output, on batches with several
rows and padding. `greedy`: whether all generated tokens equal the original's. `rotated`: the same
weights with fused norms and folded rotations, against float. The last three columns: relative
logits error of W4A8 with static scales in every dense layer, vision tower and connector included,
for the same structure widened to 512 channels, with random weights and channels 10 to 100 times
larger than the rest. `mquant` balances these channels before it rotates; `quarot` does not. Random
weights have no redundancy and nothing to learn from: these columns show the effect of outliers, not
what a trained model loses ([accuracy.md](accuracy.md) does). `status` is complete where `float` is
within 1e-4, `greedy` is equal, `rotated` is within 1e-3, and `mquant` has a smaller error than
`rtn`.

"""


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.families", __doc__ or "")
    add = parser.add_argument
    add("--case", action="append", metavar="NAME", help="only this case; repeatable")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--save", type=Path, metavar="FILE", help="write the JSON object to FILE as well, after "
        "each case; keeps other cases already in FILE")  # fmt: skip
    add("--docs", type=Path, metavar="FILE", help="write the table into a Markdown file")
    args = parser.parse_args(argv)
    for name in args.case or ():
        if name not in WIDE:
            raise UserError(f"--case {name}: expected one of {', '.join(WIDE)}")
    cases = args.case or [c for c in WIDE if (GOLDENS / c).is_dir()]
    known: dict[str, dict[str, Any]] = {}
    if args.save and args.save.is_file():
        known = {r["case"]: r for r in json.loads(args.save.read_text(encoding="utf-8"))["rows"]}
    for case in progress(cases, "families"):
        known[case] = {"case": case, **parity(case), **widened(case)}
        if args.save:
            args.save.write_text(
                json.dumps({"rows": list(known.values())}, indent=1) + "\n", "utf-8"
            )
    rows = [known[c] for c in WIDE if c in known]
    if args.docs:
        args.docs.write_text(DOCS + table(rows) + "\n", "utf-8")
    print(json.dumps({"rows": rows}) if args.json else table(rows))
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
