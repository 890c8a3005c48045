"""An evaluation as a text table and as an HTML page of flipped answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mquant_jax.eval.evaluation import Checks, Evaluation, ModelResult
from mquant_jax.report.flips import Flip, flips_page

_HEADER = ("model", "score", "difference", "95 % interval", "McNemar p", "right > wrong",
          "wrong > right", "empty", "tokens")  # fmt: skip
_MOST_FLIPS = 200  # shown on the page per kind and model


def header(evaluation: Evaluation) -> list[str]:
    """Names of the columns."""
    checks = evaluation.checks
    asked = {"same token": checks.forced, "KL, nats": checks.kl, "pictures swapped":
             checks.swap_images}  # fmt: skip
    return [*_HEADER, *(name for name, wanted in asked.items() if wanted)]


def rows(evaluation: Evaluation) -> list[list[str]]:
    """One row of cells per model, for the columns of :func:`header`."""
    return [[*_cells(m), *_checked(m, evaluation.checks)] for m in evaluation.models]


def _checked(m: ModelResult, checks: Checks) -> list[str]:
    """Cells of the optional measurements."""
    cells, a = [], m.agreement
    if checks.forced:
        cells.append(f"{100 * a.agreement:.2f} %" if a else "-")
    if checks.kl:
        cells.append(f"{a.kl:.5f}" if a and a.kl is not None else "-")
    return cells + ([f"{m.swapped:.2f}"] if m.swapped is not None else [])


def _cells(m: ModelResult) -> list[str]:
    cells, d = [m.path, f"{m.score:.2f}"], m.difference
    if d is None:
        cells += ["-"] * 5
    else:
        low, high = d.ci95
        cells += [f"{d.delta:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        flips = [f"{d.mcnemar_p:.3f}", str(len(d.right_to_wrong)), str(len(d.wrong_to_right))] \
            if d.mcnemar_p is not None else ["-"] * 3  # fmt: skip
        cells += flips
    return [*cells, str(m.empty), f"{m.mean_tokens:.1f}"]


def text(evaluation: Evaluation) -> str:
    """The table of scores, and all metrics with a column per model."""
    task = evaluation.task
    table = [header(evaluation), *rows(evaluation)]
    lines = [f"{task.title}: {len(evaluation.questions)} "
             f"{'questions' if task.judge else 'windows'}, score in {task.unit}"
             + (", lower is better" if task.lower_is_better else "")]  # fmt: skip
    lines += _aligned(table if len(evaluation.models) > 1 else [r[:2] + r[7:] for r in table])
    names = list(dict.fromkeys(k for m in evaluation.models for k in m.metrics))
    if names:
        by_name = [[n, *(f"{m.metrics.get(n, 0):.2f}" for m in evaluation.models)] for n in names]
        lines += ["", *_aligned([["metric", *(m.path for m in evaluation.models)], *by_name])]
    if task.rules:
        lines += ["", f"answers read by rule: {task.rules}"]
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines


def write_flips(evaluation: Evaluation, path: Path) -> None:
    """Write the HTML page of answers that flipped between right and wrong against the first model.

    Raises:
        ImageError: a picture cannot be read.
    """
    sections = {}
    for m in evaluation.models[1:]:
        if m.difference is not None:
            for name, places in (("right to wrong", m.difference.right_to_wrong),
                                 ("wrong to right", m.difference.wrong_to_right)):  # fmt: skip
                shown = [_flip(evaluation, m, i) for i in places[:_MOST_FLIPS]]
                more = f", {len(places)} in all" if len(places) > _MOST_FLIPS else ""
                sections[f"{m.path}: {name}{more}"] = shown
    page = flips_page(
        f"{evaluation.task.title}: flipped answers", header(evaluation), rows(evaluation), sections
    )
    path.write_text(page, encoding="utf-8")


def _flip(evaluation: Evaluation, model: ModelResult, place: int) -> Flip:
    question = evaluation.questions[place]
    answers = [
        (m.path, m.answers[place].text, bool(m.table.right[place]))
        for m in (evaluation.models[0], model)
    ]
    sample = question.sample
    return Flip(question.id, sample.question, question.answers, sample.images, answers)
