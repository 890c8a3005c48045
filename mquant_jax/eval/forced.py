"""How far models agree token by token: each is fed the first one's answers.

Fed with the same tokens, models can be compared at every position, also behind the first one at
which they would have parted.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mquant_jax.api import Model
from mquant_jax.errors import PromptTooLong, UserError
from mquant_jax.eval import hosts
from mquant_jax.eval.answers import Answer
from mquant_jax.eval.question import Question
from mquant_jax.eval.runner import Progress, batches, silent, windows
from mquant_jax.models.base import Prompt, longest
from mquant_jax.runtime.options import Options

_Position = tuple[int, int]  # of a question among all, and of a token in its answer


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A model against the first.

    Attributes:
        agreement: share of positions at which both find the same token the likeliest.
        kl: mean over positions of KL(first || this), in nats; ``None`` where it was not asked for.
    """

    agreement: float
    kl: float | None


class TeacherForcing:
    """What the first model expects at each position of its answers, and what others make of it.

    A position is a token of an answer, or its end. The first model's likeliest tokens are kept in
    memory, its log-probabilities in a file without a name: 4 bytes x vocabulary x positions of the
    questions that ``kl`` counts. One model is in memory at a time, and one position of a batch.

    Args:
        kl: compute the divergence on the first so many questions; 0: none.
        folder: on the disk that takes the file; default: the system's place for such files.
    """

    def __init__(self, kl: int = 0, folder: Path | None = None):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.kl, self.folder = kl, folder
        self._answers: list[Answer] = []
        self._likeliest: dict[_Position, int] = {}
        self._rows: dict[_Position, int] = {}
        self._vocabulary = 0

    def __enter__(self) -> TeacherForcing:
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def visit(
        self,
        model: Model,
        questions: Sequence[Question],
        answers: Sequence[Answer],
        options: Options,
        progress: Progress = silent,
    ) -> Agreement | None:
        """Feed a model the first one's answers, in the batches in which they were made.

        Args:
            answers: this model's; they count where it is the first.

        Returns:
            How far the model agrees with the first; ``None`` for the first itself.

        Raises:
            UserError: a vocabulary of another size.
        """
        if not self._answers:
            self._answers = list(answers)
            for at, row in self._walk(model, questions, options, progress):
                self._keep(at, row)
            return None
        sums: dict[str, list[float]] = {}
        for at, row in self._walk(model, questions, options, progress):
            if len(row) != self._vocabulary:
                raise UserError(f"the first model's vocabulary has {self._vocabulary} tokens, this "
                                f"one's {len(row)}; token by token, models are compared on one "
                                "tokenizer")  # fmt: skip
            positions, same, nats = sums.get(str(at[0]), (0, 0, 0.0))
            same += int(row.argmax()) == self._likeliest[at]
            nats += divergence(self._kept(at), row) if at in self._rows else 0.0
            sums[str(at[0])] = [positions + 1, same, nats]
        return self._total(hosts.merged(sums), len(questions))

    def _total(self, sums: Mapping[str, Sequence[float]], questions: int) -> Agreement:
        rows = [sums[str(i)] for i in range(questions)]  # one order, whichever host had which
        measured = rows[: self.kl]
        share = sum(r[1] for r in rows) / sum(r[0] for r in rows)
        nats = sum(r[2] for r in measured) / sum(r[0] for r in measured) if measured else None
        return Agreement(share, nats)

    def _walk(
        self, model: Model, questions: Sequence[Question], options: Options, progress: Progress
    ) -> Iterator[tuple[_Position, np.ndarray]]:
        """The log-probabilities ``[vocab]`` of every position of this host's share."""
        number = {q.id: i for i, q in enumerate(questions)}
        for window in windows(questions, options, progress, "feed answers"):
            for ids, prompts in batches(model, window, options):
                fed = [self._answers[number[key]].ids for key in ids]
                for i, rows in enumerate(_expected(model, prompts, fed)):
                    for key, tokens, row in zip(ids, fed, rows, strict=True):
                        if i <= len(tokens):
                            yield (number[key], i), row

    def _keep(self, at: _Position, row: np.ndarray) -> None:
        self._vocabulary = len(row)
        self._likeliest[at] = int(row.argmax())
        if at[0] < self.kl:
            self._rows[at] = len(self._rows)
            self._file.write(row.astype(np.float32, copy=False).tobytes())

    def _kept(self, at: _Position) -> np.ndarray:
        size = 4 * self._vocabulary
        self._file.seek(self._rows[at] * size)
        return np.frombuffer(self._file.read(size), np.float32)


def _expected(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """
    Raises:
        PromptTooLong: prompts and answers do not fit this model's context.
    """
    tokens = longest(prompts) + max(map(len, answers))
    if tokens > model.max_positions:
        raise PromptTooLong(f"a prompt and the first model's answer have {tokens} tokens, this "
                            f"model's context is {model.max_positions}")  # fmt: skip
    return model.generator.force(model.collate(prompts), answers)


def divergence(first: np.ndarray, other: np.ndarray) -> float:
    """KL(first || other) in nats of log-probabilities ``[vocab]``."""
    p, q = first.astype(np.float64), other.astype(np.float64)
    likely = np.exp(p)
    held = likely > 0
    return float(np.sum(likely[held] * (p[held] - q[held])))
