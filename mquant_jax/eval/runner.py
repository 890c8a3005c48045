"""Ask a model every question, in batches that do not depend on where a run was interrupted.

Questions are split into windows. To reduce padding, each window is sorted by prompt length before
it is split into batches. A resumed run forms the same batches of the full list, so it gives the
same answers. Hosts take turns at the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mquant_jax.api import Model
from mquant_jax.errors import UserError
from mquant_jax.eval import hosts
from mquant_jax.eval.answers import Answer, Answers
from mquant_jax.eval.question import Question
from mquant_jax.models.base import Prompt
from mquant_jax.runtime.options import Options
from mquant_jax.samples import each

WINDOW = 4  # batches whose prompts and pictures are in memory at once
Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """No progress bar."""
    return items


def ask(
    model: Model,
    questions: Sequence[Question],
    options: Options,
    answers: Answers | None = None,
    progress: Progress = silent,
) -> list[Answer]:
    """Answer every question greedily.

    Args:
        options: uses ``max_new_tokens`` and ``batch_size``.
        answers: where answers are stored; questions answered there are not asked again.
        progress: ``(items, label) -> items``.

    Returns:
        The answers in the order of the questions.

    Raises:
        UserError: no questions, or invalid ones (the message lists each).
    """
    if not questions:
        raise UserError("no samples to evaluate")
    answers = Answers() if answers is None else answers
    for window in windows(questions, options, progress, "answer"):
        if any(q.id not in answers.found for q in window):
            _ask_window(model, window, options, answers)
    answers.merge()
    return [answers.found[q.id] for q in questions]


def windows(
    questions: Sequence[Question], options: Options, progress: Progress, label: str
) -> Iterator[Sequence[Question]]:
    """This host's share of the questions, a window at a time."""
    size = WINDOW * options.batch_size
    cuts = [questions[start : start + size] for start in range(0, len(questions), size)]
    yield from progress([cut for i, cut in enumerate(cuts) if hosts.has(i)], label)


def _ask_window(
    model: Model, window: Sequence[Question], options: Options, answers: Answers
) -> None:
    for ids, prompts in batches(model, window, options):
        if all(key in answers.found for key in ids):
            continue
        out = model.generate_prompts(prompts, options.max_new_tokens)
        said = [Answer(model.processor.decode(t), len(t), ids=tuple(t)) for t in out.tokens]
        answers.add(list(zip(ids, said, strict=True)))


def batches(
    model: Model, window: Sequence[Question], options: Options
) -> Iterator[tuple[list[str], list[Prompt]]]:
    """Ids and prompts of each batch: questions of similar length."""
    prompts = each([q.sample for q in window], lambda sample: sample.prompt(model.processor))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    for start in range(0, len(order), options.batch_size):
        places = order[start : start + options.batch_size]
        yield [window[i].id for i in places], [prompts[i] for i in places]
