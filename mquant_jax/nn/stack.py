"""Stacked layers: the equal blocks of a tower as one module with a leading layer axis.

:class:`Runner` says how a model's parts are run. The default runs a stack by ``lax.scan``, so
program size does not grow with depth. Calibration and verification pass runners of their own
(layer by layer, listening at every quantisation point); no model needs to know. The names that a
model gives to its parts are the paths of their parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mquant_jax.nn.side_by_side import joined
from mquant_jax.numerics import AnyArray, QWeight
from mquant_jax.ops.dense import reads_stacks
from mquant_jax.target import target


def stack_layers(
    make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
) -> nnx.Module:
    """One module whose every parameter carries a leading axis of ``num_layers``."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), num_layers)
    state = jax.vmap(lambda key: nnx.split(make_block(nnx.Rngs(key)))[1])(keys)
    return nnx.merge(graphdef, state)


def num_layers(stack: nnx.Module) -> int:
    return jax.tree.leaves(nnx.state(stack))[0].shape[0]


class LayeredContext:
    """A context (what blocks get beside the residual stream) that may differ from layer to layer.

    Its parts that differ have a leading layer axis until :meth:`at_layer` takes one layer's.
    """

    @property
    def layered(self) -> bool:
        """Whether it differs."""
        raise NotImplementedError

    def at_layer(self, layer: Any) -> Any:
        """The context of one layer: a number, which a scan traces (int32 ``[]``)."""
        raise NotImplementedError


def context_at(context: Any, layer: Any) -> Any:
    """The context of one layer; most are the same for all."""
    return context.at_layer(layer) if isinstance(context, LayeredContext) else context


def scan_blocks(stack: nnx.Module, x: Any, context: Any) -> Any:
    """``x = block(x, context)`` for each block of a stack, by ``lax.scan``."""
    if not (isinstance(context, LayeredContext) and context.layered):
        return scan_layers(lambda block, carry: block(carry, context), stack, x)

    def body(block: nnx.Module, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        x, layer = carry
        return block(x, context.at_layer(layer)), layer + 1

    return scan_layers(body, stack, (x, jnp.int32(0)))[0]


def scan_layers(body: Callable[[nnx.Module, Any], Any], stack: nnx.Module, start: Any) -> Any:
    """``carry = body(block, carry)`` for each block of a stack, by ``lax.scan``.

    A scan slices each layer's arrays out of their stacks, and kernel operands must be separate
    arrays, so the slices would be copied. Weights whose kernels index the stack themselves are left
    whole, and each layer receives its index. On TPU, small arrays are sliced together.
    """
    graphdef, state = nnx.split(stack)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, QWeight))
    whole = [isinstance(leaf, QWeight) and reads_stacks(leaf) for leaf in leaves]
    cut = [None if stays else leaf for leaf, stays in zip(leaves, whole, strict=True)]
    numbers = jnp.arange(num_layers(stack), dtype=jnp.int32) if any(whole) else None
    cut, restored = joined(cut) if target().platform == "tpu" else (cut, lambda parts: parts)

    def step(carry, layer):
        parts, number = layer
        parts = [
            dataclasses.replace(leaf, layer=number) if stays else part
            for leaf, part, stays in zip(leaves, restored(parts), whole, strict=True)
        ]
        return body(nnx.merge(graphdef, jax.tree.unflatten(tree, parts)), carry), None

    return jax.lax.scan(step, start, (cut, numbers))[0]


class Runner:
    """Runs blocks by scan and single modules directly."""

    def layers(self, name: str, stack: nnx.Module, x: Any, context: Any) -> Any:
        """Feed ``x`` through every block: ``x = block(x, context)``.

        ``context.token_class`` holds the class of each token of ``x``; -1 marks padding. A
        :class:`LayeredContext` gives each block its own.
        """
        return scan_blocks(stack, x, context)

    def module(self, name: str, module: nnx.Module, x: Any, classes: AnyArray | None) -> Any:
        """Call one module outside the stacks (patch embedding, merger).

        ``x``: an array, or a tuple of arrays with the same leading axis.
        ``classes``: int32, the token class of each row that its first quantisation point sees;
        -1 marks padding; ``None`` where there is no such point. Only calibration uses it.
        """
        return module(x)


SCAN = Runner()
