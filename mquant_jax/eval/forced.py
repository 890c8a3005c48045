"""Token-level agreement of models under teacher forcing with the first model's answers.

On the same tokens, models can be compared at every position, including those after the first
token on which their own answers would differ.
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

_Position = tuple[int, int]  # index of a question, and of a token in its answer


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A model compared with the first.

    Attributes:
        agreement: fraction of positions at which both have the same most likely token.
        kl: mean over positions of KL(first || this), in nats; ``None`` if not requested.
    """

    agreement: float
    kl: float | None


class TeacherForcing:
    """The first model's predictions at each position of its answers, and those of other models.

    A position is a token of an answer, or its end. The first model's most likely tokens are kept
    in memory, its log-probabilities in an anonymous file of 4 bytes x vocabulary x positions of
    the first ``kl`` questions. Memory holds one model, and one position of a batch, at a time.

    Args:
        kl: compute the divergence on the first ``kl`` questions; 0: none.
        folder: where to create the file; default: the system's temporary folder.
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
        """Run a model on the first one's answers, in the batches in which they were generated.

        Args:
            answers: this model's answers; used if it is the first.

        Returns:
            The agreement with the first model; ``None`` for the first itself.

        Raises:
            UserError: the vocabulary has another size.
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
                                f"one's {len(row)}; token by token, only models with the same "
                                "tokenizer can be compared")  # fmt: skip
            positions, same, nats = sums.get(str(at[0]), (0, 0, 0.0))
            same += int(row.argmax()) == self._likeliest[at]
            nats += divergence(self._kept(at), row) if at in self._rows else 0.0
            sums[str(at[0])] = [positions + 1, same, nats]
        return self._total(hosts.merged(sums), len(questions))

    def _total(self, sums: Mapping[str, Sequence[float]], questions: int) -> Agreement:
        rows = [sums[str(i)] for i in range(questions)]  # an order independent of hosts
        measured = rows[: self.kl]
        share = sum(r[1] for r in rows) / sum(r[0] for r in rows)
        nats = sum(r[2] for r in measured) / sum(r[0] for r in measured) if measured else None
        return Agreement(share, nats)

    def _walk(
        self, model: Model, questions: Sequence[Question], options: Options, progress: Progress
    ) -> Iterator[tuple[_Position, np.ndarray]]:
        """Log-probabilities ``[vocab]`` at every position of this host's share."""
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
        PromptTooLong: a prompt and its answer exceed this model's context.
    """
    tokens = longest(prompts) + max(map(len, answers))
    if tokens > model.max_positions:
        raise PromptTooLong(f"a prompt and the first model's answer have {tokens} tokens, this "
                            f"model's context is {model.max_positions}")  # fmt: skip
    return model.generator.force(model.collate(prompts), answers)


def divergence(first: np.ndarray, other: np.ndarray) -> float:
    """KL(first || other) of log-probabilities ``[vocab]``, in nats."""
    p, q = first.astype(np.float64), other.astype(np.float64)
    likely = np.exp(p)
    held = likely > 0
    return float(np.sum(likely[held] * (p[held] - q[held])))
