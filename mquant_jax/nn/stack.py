"""Stacked layers: the equal blocks of a tower as one module with a leading layer axis.

Where a recipe's rules make some layers unlike others, a tower is a row of :class:`Segments`, each a
stack of equal layers. All functions here take either.

:class:`Runner` says how a model's parts are run. The default runs a stack by ``lax.scan``, so
program size does not grow with depth. Calibration and verification pass runners of their own
(layer by layer, listening at every quantisation point); no model needs to know. The names that a
model gives to its parts are the paths of their parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.nn.params import first_of, segment_name
from mquant_jax.nn.side_by_side import joined
from mquant_jax.numerics import AnyArray, QWeight
from mquant_jax.ops.dense import reads_stacks
from mquant_jax.per_layer import PerLayer
from mquant_jax.shapes import Array, Float, Int32
from mquant_jax.target import target

Stream = Float[Array, "*tokens width"]


def stack_layers(
    make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
) -> nnx.Module:
    """One module whose every parameter carries a leading axis of ``num_layers``."""
    graphdefs = []

    def state_of(key: jax.Array) -> nnx.State:
        graphdef, state = nnx.split(make_block(nnx.Rngs(key)))
        graphdefs.append(graphdef)  # the same for all layers; arrays alone leave a trace
        return state

    state = jax.vmap(state_of)(jax.random.split(rngs.params(), num_layers))
    return nnx.merge(graphdefs[0], state)


class Segments(nnx.Module):
    """Stacks that run one after the other.

    Each is an attribute named by the number of its first layer, see
    :func:`mquant_jax.nn.params.segment_name`.
    """

    def __init__(self, stacks: Mapping[int, nnx.Module]):
        for first, stack in stacks.items():
            setattr(self, segment_name(first), stack)


def segments(stack: nnx.Module) -> list[tuple[int, nnx.Module]]:
    """The stacks of equal layers, in order, each with the number of its first layer."""
    if not isinstance(stack, Segments):
        return [(0, stack)]
    named = ((first_of(name), part) for name, part in vars(stack).items())
    return sorted((first, part) for first, part in named if first is not None)


def num_layers(stack: nnx.Module) -> int:
    """Layers in all segments."""
    states = (nnx.state(part) for _, part in segments(stack))
    return sum(_depth(jax.tree.leaves(state, is_leaf=_kernel)) for state in states)


def _kernel(leaf: Any) -> bool:
    """Whether it is a stack of kernels that is more than an array."""
    return isinstance(leaf, QWeight | PerLayer)


def _depth(leaves: Sequence[Any]) -> int:
    """Layers of a stack by its leaves."""
    first = leaves[0]
    return (first.scale if isinstance(first, QWeight) else first).shape[0]


class LayeredContext:
    """A context (what blocks get beside the residual stream) that may differ from layer to layer.

    Its parts that differ hold those of all layers until :meth:`at_layer` takes one layer's.
    """

    @property
    def layered(self) -> bool:
        """Whether it differs."""
        raise NotImplementedError

    def scanned(self) -> Any:
        """The context with all layers' parts as arrays, for a scan."""
        return self

    def at_layer(self, layer: Any) -> Any:
        """The context of one layer: a number, of what :meth:`scanned` gives also a traced one
        (int32 ``[]``)."""
        raise NotImplementedError


def context_at(context: Any, layer: Any) -> Any:
    """The context of one layer; most are the same for all."""
    return context.at_layer(layer) if isinstance(context, LayeredContext) else context


def scanned(context: Any) -> Any:
    """The context that :func:`context_at` takes a traced number for."""
    return context.scanned() if isinstance(context, LayeredContext) else context


Step = Callable[[Any, Any], tuple[Any, None]]


def scan_blocks(stack: nnx.Module, x: Stream, context: Any) -> Stream:
    """``x = block(x, context)`` for each block of a stack, by ``lax.scan``."""
    return scan_tapped(stack, x, context)[0]


def scan_tapped(
    stack: nnx.Module,
    x: Stream,
    context: Any,
    taps: Sequence[int] = (),
    wrap: Callable[[Step], Step] = lambda step: step,
) -> tuple[Stream, tuple[Stream, ...]]:
    """:func:`scan_blocks`, and outputs of single blocks.

    Args:
        taps: numbers of blocks, no two alike, whose outputs are wanted as well.
        wrap: see :func:`scan_layers`.

    Returns:
        The last block's output, and those of the blocks ``taps``.
    """
    if not taps and not (isinstance(context, LayeredContext) and context.layered):
        return scan_layers(lambda block, carry: block(carry, context), stack, x, wrap), ()
    context = scanned(context)
    slots = np.full(num_layers(stack), len(taps), np.int32)  # the last slot: nobody wants it
    slots[list(taps)] = np.arange(len(taps))
    kept = jnp.zeros((len(taps) + 1, *x.shape), x.dtype) if taps else None

    def body(block: nnx.Module, carry: Any) -> Any:
        x, kept, layer = carry
        x = block(x, context_at(context, layer))
        if kept is not None:
            slot = jnp.asarray(slots)[layer]
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
        return x, kept, layer + 1

    x, kept, _ = scan_layers(body, stack, (x, kept, jnp.int32(0)), wrap)
    return x, tuple(kept[i] for i in range(len(taps)))


def scan_layers(
    body: Callable[[nnx.Module, Any], Any],
    stack: nnx.Module,
    start: Any,
    wrap: Callable[[Step], Step] = lambda step: step,
) -> Any:
    """``carry = body(block, carry)`` for each block of a stack, by ``lax.scan``.

    Args:
        wrap: what to do with a scan's step, such as ``jax.checkpoint``.
    """
    for _, part in segments(stack):
        start = _scan(body, part, start, wrap)
    return start


def _scan(
    body: Callable[[nnx.Module, Any], Any],
    stack: nnx.Module,
    start: Any,
    wrap: Callable[[Step], Step],
) -> Any:
    """:func:`scan_layers` of one segment.

    A scan slices each layer's arrays out of their stacks, and kernel operands must be separate
    arrays, so the slices would be copied. Weights whose kernels index the stack themselves are left
    whole, and each layer receives its index. On TPU, small arrays are sliced together.
    """
    graphdef, state = nnx.split(stack)
    leaves, tree = jax.tree.flatten(state, is_leaf=_kernel)
    whole = [_kernel(leaf) and reads_stacks(leaf) for leaf in leaves]
    cut = [None if stays else leaf for leaf, stays in zip(leaves, whole, strict=True)]
    numbers = jnp.arange(_depth(leaves), dtype=jnp.int32) if any(whole) else None
    cut, restored = joined(cut) if target().platform == "tpu" else (cut, lambda parts: parts)

    def step(carry, layer):
        parts, number = layer
        parts = [
            dataclasses.replace(leaf, layer=number) if stays else part
            for leaf, part, stays in zip(leaves, restored(parts), whole, strict=True)
        ]
        return body(nnx.merge(graphdef, jax.tree.unflatten(tree, parts)), carry), None

    return jax.lax.scan(wrap(step), start, (cut, numbers))[0]


class Runner:
    """Runs blocks by scan and single modules directly."""

    def layers(self, name: str, stack: nnx.Module, x: Stream, context: Any) -> Stream:
        """Feed ``x`` through every block: ``x = block(x, context)``.

        ``context.token_class`` holds the class of each token of ``x``; -1 marks padding. A
        :class:`LayeredContext` gives each block its own.
        """
        return self.tapped(name, stack, x, context)[0]

    def tapped(
        self, name: str, stack: nnx.Module, x: Stream, context: Any, taps: tuple[int, ...] = ()
    ) -> tuple[Stream, tuple[Stream, ...]]:
        """:meth:`layers`, and the outputs of the blocks ``taps``."""
        return scan_tapped(stack, x, context, taps)

    def module(
        self, name: str, module: nnx.Module, x: Any, classes: Int32[AnyArray, "*rows"] | None
    ) -> Any:
        """Call one module outside the stacks (patch embedding, merger).

        ``x``: an array, or a tuple of arrays with the same leading axis.
        ``classes``: the token class of each row that its first quantisation point sees;
        -1 marks padding; ``None`` where there is no such point. Only calibration uses it.
        """
        return module(x)


SCAN = Runner()
