"""A model's forward pass as a sequence of calls, which somebody else may carry out.

A model writes its pass as a generator (a :data:`Flow`) that yields each part it wants to run and is
sent what the part makes of its inputs. :func:`run` carries the calls out with a
:class:`~mquant_jax.nn.stack.Runner`: at once, for inference. Calibration holds many flows, one per
chunk of prompts, and carries out the same call of all of them before it goes on to the next, so
that a part's weights are needed only once. The names of calls are the paths of their parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, TypeVar

import jax
from flax import nnx

from mquant_jax.nn.stack import SCAN, Runner
from mquant_jax.numerics import AnyArray

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """``module(x)``, for a module outside the stacks.

    Attributes:
        name: path of the module's parameters.
        x: an array, or a tuple of arrays with the same leading axis.
        classes: int32, the token class of each row that its first quantisation point sees; -1 marks
            padding.
        passed_on: the flow does nothing with the answer but pass it on, to another call or as part
            of a context. It may then be a handle that ``np.asarray`` loads.
    """

    name: str
    module: nnx.Module
    x: Any
    classes: AnyArray | None
    passed_on: bool = False


@dataclasses.dataclass(frozen=True)
class StackCall:
    """``x = block(x, context)`` for every block of a stack; ``x`` is used up.

    The answer is what the last block gives, and a tuple of what the blocks ``taps`` give. These may
    be handles, as in a call whose answer is ``passed_on``.

    Attributes:
        context: its ``token_class`` tells the class of each token of ``x``; -1 marks padding.
        taps: numbers of blocks, in rising order.
    """

    name: str
    module: nnx.Module
    x: jax.Array
    context: Any
    taps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class EmbeddingCall:
    """``module.embed(ids)``: rows of the table ``name`` for int32 ``[B, T]``."""

    name: str
    module: Any
    ids: AnyArray


Call = ModuleCall | StackCall | EmbeddingCall
Flow = Generator[Call, Any, T]


def carry_out(call: Call, runner: Runner = SCAN) -> Any:
    """What one call gives."""
    if isinstance(call, EmbeddingCall):
        return call.module.embed(call.ids)
    if isinstance(call, StackCall):
        return runner.tapped(call.name, call.module, call.x, call.context, call.taps)
    return runner.module(call.name, call.module, call.x, call.classes)


def run(flow: Flow[T], runner: Runner = SCAN) -> T:
    """Carry out every call of a flow; returns what the flow returns."""
    try:
        call = next(flow)
        while True:
            call = flow.send(carry_out(call, runner))
    except StopIteration as end:
        return end.value
