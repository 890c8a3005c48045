"""Evaluate checkpoints on a task: answers, scores, provenance and comparison."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mquant_jax.api import Model, load
from mquant_jax.checkpoint.manifest import Verify
from mquant_jax.errors import UserError
from mquant_jax.eval import hosts
from mquant_jax.eval.answers import Answer, AnswerFile, Answers
from mquant_jax.eval.compare import Difference, compare
from mquant_jax.eval.forced import Agreement, TeacherForcing
from mquant_jax.eval.overlap import Fingerprints, Overlap, calibration_of
from mquant_jax.eval.perplexity import score_text
from mquant_jax.eval.question import Question, Task
from mquant_jax.eval.record import describe, of_checkpoint
from mquant_jax.eval.runner import Progress, ask, silent
from mquant_jax.eval.scoring import Metrics, Table, Verdict, once, table_of
from mquant_jax.eval.swap import with_swapped_pictures
from mquant_jax.eval.tasks import questions_of
from mquant_jax.runtime.options import Options
from mquant_jax.validate import count

ANSWERS, SWAPPED, RESULT = "answers.jsonl", "swapped.jsonl", "result.json"


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """The results of one checkpoint.

    Attributes:
        path: the checkpoint, as the caller named it.
        run: everything that the answers depend on.
        answers: in the order of the questions.
        table: the judged answers.
        score, metrics: as the benchmark defines them.
        overlap: questions that also occur in the calibration data; ``None`` if unknown.
        agreement: agreement with the first checkpoint on its answers, if requested.
        swapped: score with the pictures of other questions, if requested.
        difference: compared with the first checkpoint; ``None`` for the first itself.
    """

    path: str
    run: dict[str, Any] = dataclasses.field(repr=False)
    answers: list[Answer] = dataclasses.field(repr=False)
    table: Table = dataclasses.field(repr=False)
    score: float
    metrics: Metrics
    overlap: Overlap | None = None
    agreement: Agreement | None = None
    swapped: float | None = None
    difference: Difference | None = None

    @property
    def empty(self) -> int:
        """Number of answers without a visible character."""
        return sum(a.nats is None and not a.text.strip() for a in self.answers)

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of an answer or a scored window."""
        return sum(a.tokens for a in self.answers) / len(self.answers)

    def own(self) -> dict[str, Any]:
        """The results that need no other checkpoint's answers, and the agreement."""
        return {
            "score": self.score,
            "metrics": self.metrics,
            "empty": self.empty,
            "mean_answer_tokens": self.mean_tokens,
            "calibration_overlap": self.overlap,
            "token_agreement": self.agreement.agreement if self.agreement else None,
            "kl_nats": self.agreement.kl if self.agreement else None,
            "swapped_images_score": self.swapped,
        }

    def to_json(self) -> dict[str, Any]:
        """The entry of ``eval --json``."""
        d = self.difference
        flips = d is not None and d.mcnemar_p is not None
        return {
            "path": self.path,
            **self.own(),
            "delta": d.delta if d else None,
            "ci95": list(d.ci95) if d else None,
            "flips": {
                "right_to_wrong": len(d.right_to_wrong),
                "wrong_to_right": len(d.wrong_to_right),
            } if d and flips else None,
            "mcnemar_p": d.mcnemar_p if d else None,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checks:
    """Optional measurements besides the score. Each costs another pass.

    Attributes:
        agreement: how often a model's most likely token is that of the first model.
        kl: number of questions to compute the divergence from the first model on
            (:class:`TeacherForcing`); 0: none.
        swap_images: the score with the pictures of other questions.

    Raises:
        UserError: ``kl`` is not a valid number of questions.
    """

    agreement: bool = False
    kl: int = 0
    swap_images: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl", count(self.kl, "kl", least=0))

    @property
    def forced(self) -> bool:
        """Whether models are run on the first one's answers."""
        return self.agreement or self.kl > 0


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """The results of all checkpoints.

    Attributes:
        task: the benchmark.
        questions: the questions, or the windows of a text.
        models: one entry per checkpoint.
        checks: the measurements made besides the score.
    """

    task: Task
    questions: list[Question]
    models: list[ModelResult]
    checks: Checks

    def __repr__(self) -> str:
        scores = ", ".join(f"{m.path}: {m.score:.4g}" for m in self.models)
        n, unit = len(self.questions), self.task.unit
        return f"Evaluation({self.task.name}, {n} questions, score in {unit!r}, {scores})"

    def to_json(self) -> dict[str, Any]:
        """The output of ``eval --json``."""
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
    split: str | None = None,
    checks: Checks = Checks(),
    devices: Sequence[Any] | None = None,
    verify: Verify = True,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate checkpoints, one in memory at a time, and compare them with the first.

    With several JAX hosts, each calls this and answers its share; all return the full result.

    Args:
        data: the task's file, a folder of shards, or a pattern; ``None``: the task's default.
        options: uses ``max_new_tokens``, ``batch_size``, ``limit`` (questions, or windows of a
            text) and ``kv_cache``; by default answers are as long as the task allows.
        out: folder for answers and results; an interrupted run resumes from the answers there.
        split: the split to use, if the data set has several.
        devices: devices to shard batches over; by default all of this process.
        verify: see :func:`mquant_jax.api.load`.

    Raises:
        UserError: bad data or checkpoints; answers of a different run in ``out``; checks that the
            task or the number of checkpoints does not allow.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate")
    _allowed(checks, task, len(checkpoints))
    options = options or Options(task.max_new_tokens or 1)
    source = task.data if data is None else data
    questions = questions_of(task, source, options.limit, split)
    about = describe(task, source, questions, options, split)
    others = None
    if checks.swap_images:
        swapped = with_swapped_pictures(questions)
        others = swapped, describe(task, source, swapped, options, split) | {"pictures": "swapped"}
    prints = Fingerprints(questions) if task.judge else None
    results: list[ModelResult] = []
    with TeacherForcing(checks.kl, out) as forced:
        for checkpoint in checkpoints:
            job = _Job(
                str(checkpoint), task, questions, options, about, out, verify, others,
                forced if checks.forced else None, devices or jax.local_devices(),
            )  # fmt: skip
            asked, result = job.run(prints, progress)
            if results:
                result = _compared(task, results[0], result)
            results.append(result)
    return Evaluation(task, asked, results, checks)


def _allowed(checks: Checks, task: Task, checkpoints: int) -> None:
    if task.judge is None and (checks.forced or checks.swap_images):
        raise UserError(f"task {task.name} scores a text: it has no answers to compare token by "
                        "token, and no pictures to swap")  # fmt: skip
    if checks.forced and checkpoints == 1:
        raise UserError("--agreement and --kl compare checkpoints with the first; give at least "
                        "two")  # fmt: skip


def _compared(task: Task, first: ModelResult, result: ModelResult) -> ModelResult:
    if len(result.answers) != len(first.answers):
        raise UserError(f"{result.path}: splits the text into {len(result.answers)} windows, the "
                        f"first checkpoint into {len(first.answers)}; compare models with the same "
                        "tokenizer")  # fmt: skip
    return dataclasses.replace(result, difference=compare(task, first.table, result.table))


@dataclasses.dataclass(frozen=True)
class _Job:
    """The evaluation of one checkpoint; attributes are those of :func:`evaluate`, and:

    Attributes:
        others: the questions with swapped pictures, and what their answers depend on.
    """

    path: str
    task: Task
    questions: list[Question]
    options: Options
    about: dict[str, Any]
    out: Path | None
    verify: Verify
    others: tuple[list[Question], dict[str, Any]] | None
    forced: TeacherForcing | None
    devices: Sequence[Any]

    def run(
        self, prints: Fingerprints | None, progress: Progress
    ) -> tuple[list[Question], ModelResult]:
        """The questions and the result."""
        task, started = self.task, time.time()
        model = load(self.path, kv_cache=self.options.kv_cache, verify=self.verify)
        model.devices = self.devices
        of_it = of_checkpoint(model)
        run = self.about | of_it
        folder = self._folder(of_it["checkpoint"])
        answers = _kept(folder, ANSWERS, run)
        before = len(answers.found)
        questions, said = self._answers(model, answers, progress)
        table = _judged(task, said, questions)
        score, metrics = task.score(table, once(table)), task.details(table)
        result = ModelResult(
            self.path, run, said, table, score, metrics,
            overlap=self._overlap(prints),
            agreement=self.forced.visit(model, questions, said, self.options, progress)
            if self.forced else None,
            swapped=self._swapped(model, folder, of_it, progress),
        )  # fmt: skip
        if folder and hosts.is_first():
            _write(folder / RESULT, result, len(said) - before, time.time() - started)
        return questions, result

    def _folder(self, checkpoint: str) -> Path | None:
        name = f"{Path(self.path).resolve().name}-{checkpoint[:8]}"
        return None if self.out is None else self.out / name

    def _overlap(self, prints: Fingerprints | None) -> Overlap | None:
        known = calibration_of(Path(self.path))
        return prints.overlap(known) if prints and known else None

    def _answers(
        self, model: Model, answers: Answers, progress: Progress
    ) -> tuple[list[Question], list[Answer]]:
        if self.task.judge is not None:
            return self.questions, ask(model, self.questions, self.options, answers, progress)
        text = self.questions[0].sample.question
        return score_text(model, text, self.options.limit, answers, progress)

    def _swapped(
        self, model: Model, folder: Path | None, of_it: dict[str, Any], progress: Progress
    ) -> float | None:
        """The score with the pictures of other questions, if requested."""
        if self.others is None:
            return None
        questions, about = self.others
        answers = _kept(folder, SWAPPED, about | of_it)
        said = ask(model, questions, self.options, answers, progress)
        table = _judged(self.task, said, questions)
        return self.task.score(table, once(table))


def _kept(folder: Path | None, name: str, run: dict[str, Any]) -> Answers:
    """The store for answers: a file, or memory."""
    return AnswerFile(folder / name, run, jax.process_index()) if folder else Answers()


def _judged(task: Task, said: Sequence[Answer], questions: Sequence[Question]) -> Table:
    verdicts = [verdict(task, a, q) for a, q in zip(said, questions, strict=True)]
    return table_of(verdicts, questions)


def verdict(task: Task, answer: Answer, question: Question) -> Verdict:
    """Judge an answer; the verdict of a scored text is its loss and number of tokens."""
    if task.judge is None:
        return Verdict(answer.nats or 0.0, size=answer.tokens)
    return task.judge(answer.text, question)


def _write(path: Path, result: ModelResult, asked: int, seconds: float) -> None:
    """Write all results of one checkpoint; only ``times`` and ``devices`` depend on resuming."""
    body = {
        "run": result.run,
        "n": len(result.answers),
        **result.own(),
        "times": {"seconds": seconds, "questions_asked": asked},
        "devices": [str(d) for d in jax.devices()],
    }
    path.write_text(json.dumps(body, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
