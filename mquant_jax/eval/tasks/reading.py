"""Benchmarks of reading text, documents and charts. The prompts are lmms-eval's."""

from __future__ import annotations

from mquant_jax.eval import metrics, scoring
from mquant_jax.eval.question import SHORT_ANSWER, Question, Task
from mquant_jax.eval.scoring import Verdict

FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")
ANNOTATORS = 4  # with fewer, no answer can get the full score


def _textvqa(answer: str, question: Question) -> Verdict:
    truths = question.answers
    if len(truths) < ANNOTATORS:  # agreed answers, not one per annotator: each gets the full score
        truths = truths * ANNOTATORS
    return Verdict(metrics.vqa_accuracy(answer, truths), answer)


def _anls(answer: str, question: Question) -> Verdict:
    return Verdict(metrics.anls(answer, question.answers), answer)


def _ocrbench(answer: str, question: Question) -> Verdict:
    formula = question.category in FORMULAS
    return Verdict(metrics.contains(answer, question.answers, formula), answer)


def _chartqa(answer: str, question: Question) -> Verdict:
    return Verdict(max(metrics.relaxed_match(answer, t) for t in question.answers), answer)


TASKS = (
    Task("textvqa", "TextVQA, VQA accuracy", "%", _textvqa, suffix=SHORT_ANSWER, category=()),
    Task("docvqa", "DocVQA, ANLS 0.5", "%", _anls, suffix=SHORT_ANSWER, category=()),
    Task("infovqa", "InfographicVQA, ANLS 0.5", "%", _anls, suffix=SHORT_ANSWER, category=()),
    Task(
        "ocrbench", "OCRBench", "of 1000", _ocrbench,
        score=scoring.thousand, details=scoring.ocrbench_metrics,
        category=("category", "question_type"), max_new_tokens=128,
    ),
    Task(
        "chartqa", "ChartQA, relaxed accuracy", "%", _chartqa,
        suffix="\nAnswer the question with a single word.",
        category=("split", "type", "human_or_machine"),
    ),
)  # fmt: skip
