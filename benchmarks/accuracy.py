"""Accuracy of every method on the bundled model: exact match, and divergence from float.

    python -m benchmarks.accuracy --bed demo|outlier [--quick] [--json] [--save FILE]

``demo`` is the bundled model as it is; ``outlier`` is the same function with channels made 10 to
100 times larger than the rest (benchmarks/outliers.py; ``--draw`` chooses the random draw), which
is what large models look like. Calibration uses the bundled calibration set only. Intervals are
95 % bootstrap intervals over questions; KL is the mean over answer tokens, in nats.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.outliers import with_outliers
from convert.plan import plan
from convert.reader import Reader
from models.registry import family_for
from mquant_jax.api import Model
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.eval.exact_match import evaluate
from mquant_jax.nn.params import set_params
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.calibration_data import load_calibration, with_answer
from mquant_jax.ptq.pipeline import abstract_model, quantize_params, untied
from mquant_jax.recipe import Recipe, Weights
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, Sample, read_samples

NAIVE = dataclasses.replace(
    PRESETS["w4a8-rtn"], weights=Weights(clip=False), modality_scales=False
)
QUAROT = dataclasses.replace(PRESETS["w4a8"], modality_scales=False, sink_class=False)
# Method -> recipe with static activations. The rows between rtn and mquant are its ablation.
METHODS = {
    "rtn": NAIVE,
    "smoothquant": dataclasses.replace(NAIVE, smooth=True),
    "rtn+rotation": dataclasses.replace(NAIVE, rotate=True),
    "quarot": QUAROT,
    "quarot+msq": dataclasses.replace(QUAROT, modality_scales=True),
    "mquant": PRESETS["w4a8"],
}
WITH_DYNAMIC = ("rtn", "smoothquant", "quarot", "mquant")


def dynamic(recipe: Recipe) -> Recipe:
    """The same weights with one activation scale per token, found at run time."""
    changes = {
        s: dataclasses.replace(recipe.section(s), activations="dynamic")
        for s in ("vision", "connector", "language", "head")
    }
    return dataclasses.replace(recipe, **changes)


class Bed:
    """The float model in one of its forms, the calibration batch and the questions."""

    def __init__(self, name: str, draw: int, questions: int):
        source = DEMO_ASSETS / "model"
        reader = Reader(source)
        self.family = family_for(reader.config, source)
        todo = plan(self.family, self.family.config_from_hf(reader.config), reader)
        params = todo.read(reader, lambda items, *_: items)
        params = {k: np.asarray(v, np.float32) for k, v in params.items()}
        self.config, self.params = untied(todo.config, params)
        self.processor = self.family.processor(source, self.config)
        self.calibration = self.processor.collate(load_calibration(None, self.processor))
        self.samples = read_samples(BUNDLED_HELDOUT, questions)
        self.answers = self._answers()
        self.float = self.model(Recipe())
        self.float_logits = self.logits(self.float)
        if name == "outlier":
            streams = self.family.streams(self.config)
            self.params = with_outliers(self.params, streams, draw)
            moved = self.logits(self.model(Recipe()))
            if not np.allclose(moved, self.float_logits, rtol=1e-3, atol=1e-3):
                raise AssertionError("the outlier bed changed the model's function")

    def _answers(self):
        """The questions with their answers as one batch, and where answer tokens are predicted."""
        prompts = [with_answer(s, self.processor) for s in self.samples]
        batch = jax.tree.map(jnp.asarray, self.processor.collate(prompts))
        mask = np.zeros(batch.input_ids.shape, bool)
        for row, sample in zip(mask, self.samples, strict=True):
            row[-1 - len(self.processor.encode(sample.answer)) :] = True
        return batch, mask

    def model(self, recipe: Recipe) -> Model:
        """The bed's model quantised as ``recipe`` says."""
        params = dict(self.params)
        if recipe.changes_weights:
            batch = self.calibration if recipe.needs_calibration else None
            params, _ = quantize_params(self.family, self.config, recipe, params, batch)
        module = abstract_model(self.family, self.config, recipe)
        set_params(module, params)
        return Model(module, self.config, {}, self.processor)

    def logits(self, model: Model) -> np.ndarray:
        """Log-probabilities at the answers' positions, float32 ``[tokens, vocab]``."""
        batch, mask = self.answers
        logits = jax.jit(lambda m, b: jax.nn.log_softmax(m(b)))(model.module, batch)
        return np.asarray(logits)[mask]


def interval(correct: list[bool], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    hits = np.asarray(correct, float)
    means = hits[rng.integers(0, hits.size, (draws, hits.size))].mean(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def measure(bed: Bed, model: Model, samples: list[Sample]) -> dict[str, Any]:
    """Exact match, its interval, and divergence from the float model."""
    result = evaluate(model, samples, batch_size=100, max_new_tokens=8)
    ours = bed.logits(model)
    kl = (np.exp(bed.float_logits) * (bed.float_logits - ours)).sum(-1).mean()
    error = np.linalg.norm(ours - bed.float_logits) / np.linalg.norm(bed.float_logits)
    return {
        "exact_match": result.score,
        "ci95": interval(result.correct),
        "kl": float(kl),
        "logit_error": float(error),
    }


def run(bed: Bed) -> dict[str, Any]:
    """Every method, static and where it is a reference dynamic."""
    plans = [(name, "static", recipe) for name, recipe in METHODS.items()]
    plans += [(name, "dynamic", dynamic(METHODS[name])) for name in WITH_DYNAMIC]
    rows = []
    for name, activations, recipe in progress(plans, "methods"):
        row = {"method": name, "group_size": recipe.language.group_size, "activations": activations}
        rows.append(row | measure(bed, bed.model(recipe), bed.samples))
    floats = measure(bed, bed.float, bed.samples)
    return {
        "float_exact_match": floats["exact_match"],
        "float_ci95": floats["ci95"],
        "n": len(bed.samples),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    titles = ("exact match", "95 % interval", "KL")
    lines = [f"{'method':<14} {'activations':<12} {titles[0]:>12} {titles[1]:>16} {titles[2]:>9}"]
    low, high = result["float_ci95"]
    score = result["float_exact_match"]
    lines.append(f"{'float':<14} {'-':<12} {score:>12.1%} {low:>8.1%} {high:>7.1%} {0:>9.4f}")
    for r in result["rows"]:
        low, high = r["ci95"]
        lines.append(f"{r['method']:<14} {r['activations']:<12} {r['exact_match']:>12.1%} "
                     f"{low:>8.1%} {high:>7.1%} {r['kl']:>9.4f}")  # fmt: skip
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.accuracy", __doc__ or "")
    add = parser.add_argument
    add("--bed", choices=("demo", "outlier"), default="demo", help="default demo")
    add("--draw", type=int, default=0, metavar="SEED", help="random draw of the outlier bed")
    add("--quick", action="store_true", help="100 questions instead of 500")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--save", type=Path, metavar="FILE", help="write the JSON object to FILE as well")
    args = parser.parse_args(argv)
    result = {"bed": args.bed, "draw": args.draw}
    result |= run(Bed(args.bed, args.draw, 100 if args.quick else 500))
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else table(result))
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
