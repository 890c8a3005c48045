"""The benchmarks of ``eval --task``, each declared as a :class:`Task`."""

from __future__ import annotations

from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.eval.question import Question, Task
from mquant_jax.eval.readers.fields import read_questions
from mquant_jax.eval.tasks import options, plain, reading, yes_no
from mquant_jax.validate import choice

TASKS: dict[str, Task] = {
    task.name: task for task in (*plain.TASKS, *reading.TASKS, *options.TASKS, *yes_no.TASKS)
}


def find_task(name: str) -> Task:
    """
    Raises:
        UserError: no task of this name.
    """
    return TASKS[choice(name, "task", tuple(TASKS))]


def questions_of(
    task: Task, data: Path | None, limit: int | None = None, split: str | None = None
) -> list[Question]:
    """Read the task's questions from its files.

    Args:
        data: a file, a folder or a pattern; ``None``: the task's default, if it has one.
        limit: maximum number of questions.
        split: the split to use, if the data set has several.

    Raises:
        UserError: no file, or an unreadable one; see the readers.
    """
    data = task.data if data is None else data
    if data is None:
        raise UserError(f"task {task.name} needs --data FILE: the package neither contains nor "
                        "downloads its data")  # fmt: skip
    if task.read is None:
        return read_questions(data, task, limit, split)
    if split is not None:
        raise UserError(f"--split {split}: the data of task {task.name} have no splits")
    return task.read(data, task, limit)
