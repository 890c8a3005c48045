"""The bundled model as a test bed: exact match on held-out questions, divergence from float."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.outliers import with_outliers
from mquant_jax.api import Model
from mquant_jax.checkpoint.plan import plan
from mquant_jax.checkpoint.source import Reader
from mquant_jax.eval.exact_match import evaluate
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import set_params
from mquant_jax.ptq.calibration_data import load_calibration, with_answer
from mquant_jax.ptq.pipeline import untied
from mquant_jax.recipe import Recipe
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, read_samples


class DemoBed:
    """The bundled model, unchanged or made hard to quantise.

    Attributes:
        family, config, params: the float model, its head untied.
        calibration: the bundled calibration set as one batch.
        n: number of questions.

    Args:
        questions: how many of the 500 held-out questions to ask.
        draw: random seed of the outliers (benchmarks/outliers.py); ``None`` adds none.
    """

    def __init__(self, questions: int, draw: int | None = None):
        source = DEMO_ASSETS / "model"
        reader = Reader(source)
        self.family = family_for(reader.config, source)
        todo = plan(self.family, self.family.config_from_hf(reader.config), reader)
        params = {k: np.asarray(v, np.float32) for k, v in todo.read(reader).items()}
        self.config, self.params = untied(todo.config, params)
        self.processor = self.family.processor(source, self.config)
        self.calibration = self.processor.collate(load_calibration(None, self.processor))
        self.samples = read_samples(BUNDLED_HELDOUT, questions)
        self.n = len(self.samples)
        self._answers = self._answer_batch()
        model = self._float()
        self._reference = self._log_probs(model)
        if draw is not None:
            self.params = with_outliers(self.params, self.family.streams(self.config), draw)
            model = self._float()
            if not np.allclose(self._log_probs(model), self._reference, rtol=1e-3, atol=1e-3):
                raise AssertionError("the outlier bed changed the model's function")
        self.float_result = self.evaluate(model)

    def _float(self) -> nnx.Module:
        model = abstract_model(self.family, self.config, Recipe())
        set_params(model, dict(self.params))
        return model

    def _answer_batch(self):
        """Return the questions with their answers, and a mask of positions that predict answer
        tokens."""
        prompts = [with_answer(s, self.processor) for s in self.samples]
        batch = jax.tree.map(jnp.asarray, self.processor.collate(prompts))
        mask = np.zeros(batch.input_ids.shape, bool)
        for row, sample in zip(mask, self.samples, strict=True):
            row[-1 - len(self.processor.encode(sample.answer)) :] = True
        return batch, mask

    def _log_probs(self, module: nnx.Module) -> np.ndarray:
        """Return log-probabilities, float32 ``[answer tokens, vocab]``."""
        batch, mask = self._answers
        return np.asarray(jax.jit(lambda m, b: jax.nn.log_softmax(m(b)))(module, batch))[mask]

    def evaluate(self, module: nnx.Module) -> dict[str, Any]:
        """Return exact match and its 95 % interval, KL per answer token in nats, and the logit
        error."""
        model = Model(module, self.config, {}, self.processor)
        result = evaluate(model, self.samples, batch_size=100, max_new_tokens=8)
        ours, theirs = self._log_probs(module), self._reference
        return {
            "exact_match": result.score,
            "ci95": interval(result.correct),
            "kl": float((np.exp(theirs) * (theirs - ours)).sum(-1).mean()),
            "logit_error": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        }


def interval(correct: list[bool], draws: int = 2000) -> list[float]:
    """Return the 95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    hits = np.asarray(correct, float)
    means = hits[rng.integers(0, hits.size, (draws, hits.size))].mean(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]
