"""Checkpoints on a task: answers, scores, what a result depends on, and the comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mquant_jax
from mquant_jax.api import Model, load
from mquant_jax.checkpoint.manifest import Verify, content_hash
from mquant_jax.checkpoint.provenance import hash_files
from mquant_jax.errors import UserError
from mquant_jax.eval.answers import Answer, AnswerFile, Answers
from mquant_jax.eval.compare import Difference, compare
from mquant_jax.eval.overlap import Fingerprints, Overlap, calibration_of
from mquant_jax.eval.perplexity import LENGTH, score_text
from mquant_jax.eval.question import Question, Task, picture_key
from mquant_jax.eval.runner import WINDOW, Progress, ask, silent
from mquant_jax.eval.scoring import Metrics, Table, Verdict, once, table_of
from mquant_jax.eval.tasks import questions_of
from mquant_jax.files import read_json_if_any
from mquant_jax.runtime.options import Options

ANSWERS, RESULT = "answers.jsonl", "result.json"


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """One checkpoint's part of an evaluation.

    Attributes:
        path: the checkpoint, as it was named.
        run: all that the answers depend on.
        answers: in the order of the questions.
        table: the judged answers.
        score, metrics: as published.
        overlap: questions that the calibration data have, too; ``None`` where that is not known.
        difference: to the first checkpoint; ``None`` for the first itself.
    """

    path: str
    run: dict[str, Any] = dataclasses.field(repr=False)
    answers: list[Answer] = dataclasses.field(repr=False)
    table: Table = dataclasses.field(repr=False)
    score: float
    metrics: Metrics
    overlap: Overlap | None = None
    difference: Difference | None = None

    @property
    def empty(self) -> int:
        """Answers without a character that shows."""
        return sum(a.nats is None and not a.text.strip() for a in self.answers)

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer, or of a scored window."""
        return sum(a.tokens for a in self.answers) / len(self.answers)

    def to_json(self) -> dict[str, Any]:
        """The entry of ``eval --json``."""
        d = self.difference
        flips = d is not None and d.mcnemar_p is not None
        return {
            "path": self.path,
            "score": self.score,
            "metrics": self.metrics,
            "delta": d.delta if d else None,
            "ci95": list(d.ci95) if d else None,
            "flips": {
                "right_to_wrong": len(d.right_to_wrong),
                "wrong_to_right": len(d.wrong_to_right),
            } if d and flips else None,
            "mcnemar_p": d.mcnemar_p if d else None,
            "empty": self.empty,
            "mean_answer_tokens": self.mean_tokens,
            "calibration_overlap": self.overlap,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """All checkpoints of one call.

    Attributes:
        task: the benchmark.
        questions: what was asked, or the windows of a text.
        models: one entry per checkpoint.
    """

    task: Task
    questions: list[Question]
    models: list[ModelResult]

    def __repr__(self) -> str:
        scores = ", ".join(f"{m.path}: {m.score:.4g}" for m in self.models)
        n, unit = len(self.questions), self.task.unit
        return f"Evaluation({self.task.name}, {n} questions, score in {unit!r}, {scores})"

    def to_json(self) -> dict[str, Any]:
        """What ``eval --json`` prints."""
        return {
            "task": self.task.name,
            "unit": self.task.unit,
            "n": len(self.questions),
            "models": [m.to_json() for m in self.models],
        }


def evaluate(
    checkpoints: Sequence[str | Path],
    task: Task,
    data: Path | None = None,
    options: Options | None = None,
    out: Path | None = None,
    *,
    verify: Verify = True,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate checkpoints, one in memory at a time, and compare them with the first.

    Args:
        data: the task's file; ``None``: the task's own.
        options: ``max_new_tokens``, ``batch_size``, ``limit`` (questions, or windows of a text) and
            ``kv_cache`` are used; by default answers are as long as the task allows.
        out: folder for answers and results; a run that was stopped goes on from the answers there.
        verify: see :func:`mquant_jax.api.load`.

    Raises:
        UserError: bad data or checkpoints; answers in ``out`` that another run made.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate")
    options = options or Options(task.max_new_tokens or 1)
    source = task.data if data is None else data
    questions = questions_of(task, source, options.limit)
    about = describe(task, source, questions, options)
    prints = Fingerprints(questions) if task.judge else None
    results: list[ModelResult] = []
    for checkpoint in checkpoints:
        job = _Job(str(checkpoint), task, questions, options, about, out, verify)
        asked, result = job.run(prints, progress)
        if results and len(asked) != len(results[0].answers):
            raise UserError(f"{checkpoint}: cuts the text into {len(asked)} windows, the first "
                            f"checkpoint into {len(results[0].answers)}; models are compared on "
                            "one tokenizer")  # fmt: skip
        first = results[0].table if results else None
        if first is not None:
            difference = compare(task, first, result.table)
            result = dataclasses.replace(result, difference=difference)
        results.append(result)
    return Evaluation(task, asked, results)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One checkpoint's evaluation; attributes as the arguments of :func:`evaluate`."""

    path: str
    task: Task
    questions: list[Question]
    options: Options
    about: dict[str, Any]
    out: Path | None
    verify: Verify

    def run(
        self, prints: Fingerprints | None, progress: Progress
    ) -> tuple[list[Question], ModelResult]:
        """What was asked, and the result."""
        task, started = self.task, time.time()
        model = load(self.path, kv_cache=self.options.kv_cache, verify=self.verify)
        run = self.about | of_checkpoint(model)
        folder = self._folder(run["checkpoint"])
        answers = AnswerFile(folder / ANSWERS, run) if folder else Answers()
        before = len(answers.found)
        questions, said = self._answers(model, answers, progress)
        verdicts = [verdict(task, a, q) for a, q in zip(said, questions, strict=True)]
        table = table_of(verdicts, questions)
        score, metrics = task.score(table, once(table)), task.details(table)
        known = calibration_of(Path(self.path))
        overlap = prints.overlap(known) if prints and known else None
        result = ModelResult(self.path, run, said, table, score, metrics, overlap)
        if folder:
            _write(folder / RESULT, result, len(said) - before, time.time() - started)
        return questions, result

    def _folder(self, checkpoint: str) -> Path | None:
        name = f"{Path(self.path).resolve().name}-{checkpoint[:8]}"
        return None if self.out is None else self.out / name

    def _answers(
        self, model: Model, answers: Answers, progress: Progress
    ) -> tuple[list[Question], list[Answer]]:
        if self.task.judge is not None:
            return self.questions, ask(model, self.questions, self.options, answers, progress)
        text = self.questions[0].sample.question
        return score_text(model, text, self.options.limit, answers, progress)


def verdict(task: Task, answer: Answer, question: Question) -> Verdict:
    """What the answer is worth; a scored text is its loss and its tokens."""
    if task.judge is None:
        return Verdict(answer.nats or 0.0, size=answer.tokens)
    return task.judge(answer.text, question)


def _write(path: Path, result: ModelResult, asked: int, seconds: float) -> None:
    """Everything about one checkpoint; where a run went on, ``times`` and ``devices`` differ."""
    body = {
        "run": result.run,
        "n": len(result.answers),
        "score": result.score,
        "metrics": result.metrics,
        "empty": result.empty,
        "mean_answer_tokens": result.mean_tokens,
        "calibration_overlap": result.overlap,
        "times": {"seconds": seconds, "questions_asked": asked},
        "devices": [str(d) for d in jax.local_devices()],
    }
    path.write_text(json.dumps(body, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def describe(
    task: Task, data: Path | None, questions: Sequence[Question], options: Options
) -> dict[str, Any]:
    """What answers depend on besides the checkpoint."""
    digest = hashlib.sha256()
    for q in questions:
        pictures = [picture_key(image) for image in q.sample.images]
        text = json.dumps([q.id, q.sample.question, q.sample.messages, pictures])
        digest.update(text.encode())
    return {
        "task": task.name,
        "data": hash_files([data]) if data else {},
        "limit": options.limit,
        "questions": len(questions),
        "questions_sha256": digest.hexdigest(),
        "prompt": {
            "suffix": task.suffix,
            "example": questions[0].sample.question if task.judge else "",
        },
        "option_rules": task.rules,
        "decoding": {
            "kind": "greedy" if task.judge else f"none; loss of windows of {LENGTH} tokens",
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "window": WINDOW * options.batch_size,
            "kv_cache": options.kv_cache,
            "layout": options.layout,
        },
        "versions": {"mquant_jax": mquant_jax.__version__, "jax": jax.__version__},
    }


def of_checkpoint(model: Model) -> dict[str, Any]:
    """The checkpoint's hash, recipe, and how it prepares pictures, with its pixel limits."""
    manifest = model.manifest
    folder = getattr(model.processor, "folder", None)
    pictures = read_json_if_any(Path(folder) / "preprocessor_config.json") if folder else {}
    return {
        "checkpoint": manifest.get("sha256") or content_hash(manifest),
        "family": manifest["family"],
        "recipe": manifest["recipe"],
        "preprocessor": pictures,
        "dtype": str(model.module.language.dtype)
        if hasattr(model.module.language, "dtype")
        else "",
    }
