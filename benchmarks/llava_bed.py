"""The assembled LLaVA as a test bed: exact match on held-out questions, divergence from float.

    python -m benchmarks.accuracy --bed llava

``benchmarks.llava_folder`` says what the model is made of and what to install. The questions are
bundled (``examples.bundle_llava``): easy-VQA's test split, scenes, texts and emoji that training
never saw.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llava_folder import ASSETS, CONNECTOR, write
from benchmarks.llava_rows import interval
from benchmarks.picture_questions import Asked, asked, greedy, groups, reference, scores
from mquant_jax.checkpoint.plan import plan
from mquant_jax.checkpoint.source import SINGLE, Reader
from mquant_jax.checkpoint.tensor_file import file_hash
from mquant_jax.models.base import VLM, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import set_params
from mquant_jax.ptq.calibration_data import load_calibration
from mquant_jax.recipe import Recipe
from mquant_jax.samples import read_samples

EVALUATION, CALIBRATION = ASSETS / "evaluation.jsonl", ASSETS / "calibration.jsonl"
LONGEST = 16  # tokens of an answer of the model's own


class LlavaBed:
    """The float model, calibration prompts, and evaluation of any model made from it.

    Attributes:
        family, config, params: the float model; the head is tied.
        calibration: the bundled calibration prompts as one batch.
        fingerprint: hashes of the model, the questions and the calibration prompts.
        n: number of questions.

    Args:
        questions: how many of the bundled questions to ask; ``None``: all.
        folder: a folder that ``benchmarks.llava_folder`` wrote; by default a temporary one.
    """

    def __init__(self, questions: int | None = None, folder: Path | None = None):
        with tempfile.TemporaryDirectory() as temporary:
            if folder is None:
                folder = Path(temporary) / "model"
                write(folder, CONNECTOR)
            self._read(folder)
        samples = read_samples(EVALUATION, questions)
        self.n, self.tasks = len(samples), np.asarray([s.task for s in samples])
        questions_ = asked(samples, self.processor, self.config.image_token_id)
        self._pictures = np.asarray([q.picture for q in questions_])
        self.questions = np.bincount(self._pictures).tolist()  # about each picture
        self.fingerprint += [file_hash(f)["sha256"] for f in (EVALUATION, CALIBRATION)]
        self._refer(questions_)

    def _refer(self, questions: list[Asked]) -> None:
        """Keep what the float model predicts after true answers, which tell right from wrong, and
        after its own where they differ; divergence is measured after its own."""
        collate, module = self.processor.collate, self._float()
        true = list(groups(questions, collate))
        self._float_right = scores(module, true, reference(module, true)).right
        wrong = [questions[i] for i in np.flatnonzero(~self._float_right)]
        own = iter(greedy(module, wrong, collate, self.processor.stop_ids[0], LONGEST))
        pairs = zip(questions, self._float_right, strict=True)
        fed = [(q,) if right else (q, next(own)) for q, right in pairs]
        self._true = np.concatenate([np.arange(len(row)) == 0 for row in fed])
        self._own = np.concatenate([np.arange(len(row)) == len(row) - 1 for row in fed])
        self._tokens = sum(len(row[-1].answer) for row in fed)
        self._groups = list(groups([q for row in fed for q in row], collate))
        self._reference = reference(module, self._groups)

    def _read(self, folder: Path) -> None:
        reader = Reader(folder)
        self.fingerprint = [file_hash(folder / SINGLE)["sha256"]]
        self.family = family_for(reader.config, folder)
        todo = plan(self.family, self.family.config_from_hf(reader.config), reader)
        self.params = {k: np.asarray(v, np.float32) for k, v in todo.read(reader).items()}
        self.config = todo.config
        self.processor = self.family.processor(folder, self.config)
        prompts = load_calibration(CALIBRATION, self.processor)
        self.calibration = self.processor.collate(prompts)

    def _float(self) -> VLM:
        module = abstract_model(self.family, self.config, Recipe())
        set_params(module, dict(self.params))
        return module

    @property
    def float_result(self) -> dict[str, Any]:
        """Exact match of the float model, over all and by task."""
        right = self._float_right
        return {"float_exact_match": float(right.mean()), "float_by_task": self._by_task(right)}

    def evaluate(self, module: VLM) -> dict[str, Any]:
        """Return exact match and its difference to float with a 95 % interval; on the float model's
        own greedy answers, KL in nats per token and the share of tokens at which both agree."""
        found = scores(module, self._groups, self._reference)
        right = found.right[self._true]
        change = right.astype(float) - self._float_right
        return {
            "exact_match": float(right.mean()),
            "delta": float(change.mean()),
            "delta_ci95": interval(change, self._pictures),
            "kl": float(found.kl[self._own].sum() / self._tokens),
            "token_agreement": float(found.agreeing[self._own].sum() / self._tokens),
            "by_task": self._by_task(right),
            "right": np.packbits(right).tobytes().hex(),
        }

    def _by_task(self, right: np.ndarray) -> dict[str, float]:
        return {str(t): float(right[self.tasks == t].mean()) for t in np.unique(self.tasks)}
