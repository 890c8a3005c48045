"""Walk a model part by part over all calibration prompts, with one part's weights in memory.

Every chunk of prompts has its own flow (:mod:`mquant_jax.nn.flow`). The walk runs one call of all
flows, then the next; a stack is walked block by block. A visitor gets each part with its weights
and inputs, and returns the inputs of the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.lazy import Tensors
from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.flow import Call, EmbeddingCall, ModuleCall, StackCall
from mquant_jax.nn.params import assign, variables
from mquant_jax.nn.stack import context_at, num_layers, segments
from mquant_jax.ptq.ledger import Ledger
from mquant_jax.ptq.states import Spool, States, loaded

Progress = Callable[[Iterable, str], Iterable]
RowChange = Callable[[np.ndarray], np.ndarray]
LAST = "language/head_in"  # the head after it needs no calibration
SMALL = 1 << 22  # elements of the largest tensor kept in memory throughout a walk


def no_progress(items: Iterable, label: str) -> Iterable:
    """Return the items, without a progress bar."""
    return items


def working(value: np.ndarray) -> jax.Array:
    """Return a tensor in calibration's type: integers unchanged, the rest float32."""
    integer = np.issubdtype(value.dtype, np.integer)
    return jnp.asarray(value, value.dtype if integer else jnp.float32)


def filled(module: nnx.Module, name: str, params: Tensors) -> nnx.Module:
    """Return a copy of an abstract module with its tensors, those below ``name``."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for path, _ in variables(module):
        assign(copy, path, working(params["/".join((name, *path))].load()))
    return copy


def block_of(stack: nnx.Module, layer: int = 0) -> nnx.Module:
    """Return one abstract block of an abstract stack."""
    part = [part for first, part in segments(stack) if first <= layer][-1]
    graphdef, state = nnx.split(part)
    one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), state)
    return nnx.merge(graphdef, one)


@dataclasses.dataclass
class Inputs(Sequence):
    """The arguments of a module, chunk by chunk.

    Attributes:
        x: the first, or handles of it.
        contexts: the second, of all layers of a stack; ``None``: there is none.
        layer: number of the module in the stack.
    """

    x: Sequence[Any]
    contexts: Sequence[Any] | None = None
    layer: int = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> tuple:  # type: ignore[override]  # no slices
        if not 0 <= n < len(self):
            raise IndexError(n)
        x = loaded(self.x[n])
        x = tuple(map(jnp.asarray, x)) if isinstance(x, tuple) else jnp.asarray(x)
        return (x,) if self.contexts is None else (x, context_at(self.contexts[n], self.layer))


@dataclasses.dataclass
class Part:
    """A module to be visited.

    Attributes:
        name: path of its parameters, ``language/layers/3``.
        module: the float module with its weights.
        inputs: its arguments, chunk by chunk.
        classes: int32, token class of each row, chunk by chunk.
        twin: its arguments in the float model, if the walk carries them along.
    """

    name: str
    module: nnx.Module
    inputs: Inputs
    classes: Sequence[jax.Array]
    twin: Inputs | None = None


@dataclasses.dataclass
class Made:
    """What one call gives, chunk by chunk.

    Attributes:
        outs: outputs; ``None``: nothing follows.
        taps: of a stack, the outputs of the blocks that its call taps.
    """

    outs: Spool | None
    taps: list[Spool] = dataclasses.field(default_factory=list)

    def answer(self, call: Call | None, n: int) -> Any:
        """What the flow of a chunk is sent."""
        if self.outs is None:
            return None
        if isinstance(call, StackCall):
            return jnp.asarray(self.outs[n]), tuple(tap.handle(n) for tap in self.taps)
        passed_on = isinstance(call, ModuleCall) and call.passed_on
        return self.outs.handle(n) if passed_on else jnp.asarray(self.outs[n])


Outputs = Iterable[Any]


class Visitor(Protocol):
    """Receives the parts of a walk."""

    def visit(self, part: Part) -> tuple[Outputs, Outputs | None]:
        """Return the part's outputs for its inputs, chunk by chunk, and for its twin's inputs."""

    def record(self, name: str) -> dict[str, Any]:
        """Return what was learned of a part (JSON), after all its outputs have been taken."""

    def restore(self, name: str, record: dict[str, Any]) -> None:
        """Take the record of a part that an earlier process has visited."""


class Walk:
    """One pass over the parts of a model.

    Args:
        model: abstract; tensors that belong to no part, such as positions, are filled in.
        params: its tensors.
        batches: calibration prompts, chunk by chunk; their patches may be stored.
        states: keeps what is passed from part to part.
        ledger: knows what an earlier process has finished, and records parts.
        twin: carry the float model's activations along.
        rounded: maps rows of the token embedding (float32 ``[n, hidden]``) to their rounded
            values; the twin's are unchanged.
        advance: called after each part.
    """

    def __init__(
        self,
        name: str,
        model: VLM,
        params: Tensors,
        batches: Sequence[Batch],
        states: States,
        ledger: Ledger,
        *,
        twin: bool = False,
        rounded: RowChange | None = None,
        advance: Callable[[], None] = lambda: None,
    ):
        self.name, self.model, self.params, self.rounded = name, model, params, rounded
        self.batches, self.states, self.ledger = batches, states, ledger
        self.twin, self.advance = twin, advance
        self._handed: list[Spool] = []  # to flows, as handles
        for path, variable in variables(model):
            key = "/".join(path)
            if key in params and np.prod(variable.get_value().shape) <= SMALL:
                assign(model, path, working(params[key].load()))

    def run(self, visitor: Visitor) -> None:
        """Show the visitor every part in the order in which the model runs them."""
        if self.ledger.done(self._key(LAST)) is not None:
            for part, record in self.ledger.below(self.name):
                visitor.restore(part, record)
                self.advance()
        else:
            self._run(visitor)
        for spool in self._handed:
            spool.clear()
        self.states.forget(self.name)

    def _run(self, visitor: Visitor) -> None:
        batches = [on_device(b) for b in self.batches]
        flows = [self.model.flow(b) for b in batches]
        twins = [self.model.flow(b) for b in batches] if self.twin else []
        calls = [_Calls(flow) for flow in (*flows, *twins)]
        count = len(flows)
        while any(c.call is not None for c in calls):
            name = _next(calls)
            at = [i for i in range(count) if calls[i].name == name]
            here = [calls[i] for i in at]
            there = [calls[count + i] for i in at] if self.twin else None
            if isinstance(here[0].call, EmbeddingCall):
                for c in [*here, *(there or [])]:
                    assert isinstance(c.call, EmbeddingCall), "equal names are equal calls"
                    c.send(self._embedded(c.call, self.rounded if c in here else None))
                continue
            made = self._carry_out(name, here, there, visitor)
            for one, waiting in zip(made, (here, there or []), strict=True):
                self._answer(one, waiting)

    def _answer(self, made: Made, waiting: Sequence[_Calls]) -> None:
        """Send flows what they wait for."""
        calls = [c.call for c in waiting]
        for n, c in enumerate(waiting):
            c.send(made.answer(calls[n], n))
        passed_on = any(isinstance(call, ModuleCall) and call.passed_on for call in calls)
        handed = [made.outs] if passed_on and made.outs is not None else made.taps
        self._handed += handed
        if made.outs is not None and made.outs not in handed:
            made.outs.release()

    def _embedded(self, call: EmbeddingCall, rounded: RowChange | None = None) -> jax.Array:
        """Return rows of the token embedding; only those that calibration needs are read."""
        table = self.params[call.name]
        ids, back = np.unique(np.asarray(call.ids), return_inverse=True)
        rows = np.concatenate([table.read(int(i), int(i) + 1) for i in ids])
        rows = rows if rounded is None else rounded(np.asarray(rows, np.float32))
        return working(rows)[back.reshape(call.ids.shape)]

    def _carry_out(
        self, name: str, here: list[_Calls], there: list[_Calls] | None, visitor: Visitor
    ) -> tuple[Made, Made]:
        calls: list[Any] = [c.call for c in here]
        twins: list[Any] | None = None if there is None else [c.call for c in there]
        if isinstance(calls[0], StackCall):
            return self._stack(name, calls, twins, visitor)

        def part() -> Part:
            return Part(
                name,
                filled(calls[0].module, name, self.params),
                Inputs([c.x for c in calls]),
                [c.classes for c in calls],
                None if twins is None else Inputs([c.x for c in twins]),
            )

        outs, twin_outs = self._visit(visitor, name, part, None)
        return (Made(outs), Made(twin_outs)) if name != LAST else (Made(None), Made(None))

    def _stack(self, name: str, calls, twins, visitor: Visitor) -> tuple[Made, Made]:
        stack, contexts = calls[0].module, [c.context for c in calls]
        classes = [c.context.token_class for c in calls]
        own = [c.context for c in twins] if twins is not None else None
        depth = num_layers(stack)
        records = [self.ledger.done(self._key(f"{name}/{i}")) for i in range(depth)]
        first = next((i for i, record in enumerate(records) if record is None), depth)
        for i, record in enumerate(records[:first]):
            visitor.restore(f"{name}/{i}", record or {})
            self.advance()
        taps = calls[0].taps
        tapped = {i: self._found(f"{name}/{i}", len(calls)) for i in taps if i < first}
        if first:
            states = tapped.get(first - 1) or self._found(f"{name}/{first - 1}", len(calls))
        else:
            states = self.states.kept([c.x for c in calls]), None
            if twins is not None:
                states = states[0], self.states.kept([c.x for c in twins])
        for i in range(first, depth):
            here, there = states

            def part(i=i, here=here, there=there) -> Part:
                return Part(
                    f"{name}/{i}",
                    filled(block_of(stack, i), f"{name}/{i}", self.params),
                    Inputs(here, contexts, i),
                    classes,
                    None if there is None else Inputs(there, own, i),
                )

            before = None if i - 1 in taps else states
            states = self._visit(visitor, f"{name}/{i}", part, before)
            if i in taps:
                tapped[i] = states
        mine, theirs = (
            Made(states[side], [spool for i in taps if (spool := tapped[i][side]) is not None])
            for side in (0, 1)
        )
        return mine, theirs

    def _visit(self, visitor: Visitor, name: str, part: Callable[[], Part], before: Any):
        """Visit one part, or load what an earlier process computed.

        ``before``: spools to remove once the part is finished.
        """
        key = self._key(name)
        record = self.ledger.done(key)
        if record is not None:
            visitor.restore(name, record)
            self.advance()
            return self._found(name, record["chunks"])
        outs, twin_outs = visitor.visit(part())
        made: tuple[Spool, Spool | None] = self.states.kept(outs, key), None
        if twin_outs is not None:
            made = made[0], self.states.kept(twin_outs, f"{key}.float")
        for spool in made:
            if spool is not None:
                spool.sync()
        self.ledger.commit(key, {**visitor.record(name), "chunks": len(made[0])})
        for spool in before or ():
            if spool is not None:
                spool.clear()
        self.advance()
        return made

    def _found(self, name: str, count: int) -> tuple[Spool | None, Spool | None]:
        """Return the states after a part that an earlier process has finished."""
        key = self._key(name)
        found = self.states.found(key, count)
        if found is None:
            raise UserError(
                f"{self.states.folder}: the states after {name} are missing; begin anew with "
                "--restart"
            )
        return found, self.states.found(f"{key}.float", count)

    def _key(self, part: str) -> str:
        return f"{self.name}/{part}"


class _Calls:
    """A flow and the call that it waits for; ``None`` at its end."""

    def __init__(self, flow):
        self.flow = flow
        self.call: Call | None = next(flow, None)

    @property
    def name(self) -> str | None:
        return None if self.call is None else self.call.name

    def send(self, value: Any) -> None:
        """Answer the call; ``None`` abandons the flow."""
        if value is None:
            self.flow.close()
            self.call = None
            return
        try:
            self.call = self.flow.send(value)
        except StopIteration:
            self.call = None


def _next(calls: Sequence[_Calls]) -> str:
    """The call that comes first: chunks without pictures wait for those that have some."""
    names = [c.name for c in calls if c.name is not None]
    return next((n for n in names if not n.startswith("language/")), names[0])


def on_device(batch: Batch) -> Batch:
    """Return a batch as JAX arrays; stored patches stay where they are."""
    return jax.tree.map(lambda x: x if hasattr(x, "load") else jnp.asarray(x), batch)


@partial(jax.jit, static_argnums=0)
def _run(graphdef, state, *args):
    return nnx.merge(graphdef, state)(*args)


def loaded_batch(batch: Batch) -> Batch:
    """Return a batch with stored arrays loaded."""
    return jax.tree.map(loaded, batch)


def outputs(module: nnx.Module, inputs: Inputs) -> Iterator[jax.Array]:
    """Yield a module's outputs for its inputs, chunk by chunk."""
    graphdef, state = nnx.split(module)
    for args in inputs:
        yield _run(graphdef, state, *args)
