"""Operations with several implementations: which one runs, and why not those before it.

An :class:`Op` holds its implementations in the order of preference. Each says from shapes, types
and the target alone whether it takes a call, or why it does not; the last one takes every call.
:func:`recording` collects the choices made while a program is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from mquant_jax.target import Target, target

Spec = TypeVar("Spec")


@dataclasses.dataclass(frozen=True)
class Form(Generic[Spec]):
    """One implementation.

    Attributes:
        name: for reports.
        run: takes the op's operands.
        refuses: why it does not take a call; ``None``: it does.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Spec, Target], str | None] = lambda spec, target: None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs for one call.

    Attributes:
        op: the operation's name.
        spec: shapes and types of the call.
        name: of the form that runs.
        refused: the forms before it, each with its reason.
    """

    op: str
    spec: Any
    name: str
    refused: tuple[tuple[str, str], ...]


_RECORD: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "record", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collect the choices of what is traced inside; JAX does not trace a function twice."""
    choices: list[Choice] = []
    token = _RECORD.set(choices)
    try:
        yield choices
    finally:
        _RECORD.reset(token)


class Op(Generic[Spec]):
    """An operation by its forms, best first; the last one takes every call."""

    def __init__(self, name: str, *forms: Form[Spec]):
        self.name = name
        self._forms = {form.name: form for form in forms}
        self._choose = functools.lru_cache(maxsize=4096)(self._first)

    def choose(self, spec: Spec) -> Choice:
        """What runs for a call on the current target."""
        return self._choose(spec, target())

    def pick(self, spec: Spec) -> Callable[..., Any]:
        """The ``run`` of the form for a call that is being traced, which is recorded."""
        choice = self.choose(spec)
        record = _RECORD.get()
        if record is not None:
            record.append(choice)
        return self._forms[choice.name].run

    def _first(self, spec: Spec, to: Target) -> Choice:
        refused: list[tuple[str, str]] = []
        for form in self._forms.values():
            reason = form.refuses(spec, to)
            if reason is None:
                return Choice(self.name, spec, form.name, tuple(refused))
            refused.append((form.name, reason))
        raise AssertionError(f"the last form of {self.name} refuses: {refused[-1][1]}")


def unless(*conditions: tuple[bool, str]) -> str | None:
    """The reason of the first condition that does not hold."""
    return next((reason for holds, reason in conditions if not holds), None)
