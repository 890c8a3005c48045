"""Stacked layers: the equal blocks of a tower as one module with a leading layer axis.

:class:`Runner` says how a model's parts are run. The default runs a stack by ``lax.scan``, so
program size does not grow with depth. Calibration and verification pass runners of their own
(layer by layer, listening at every quantisation point); no model needs to know. The names that a
model gives to its parts are the paths of their parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


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


class Runner:
    """Runs blocks by scan and single modules directly."""

    def layers(self, name: str, stack: nnx.Module, x: Any, context: Any) -> Any:
        """Feed ``x`` through every block: ``x = block(x, context)``.

        ``context.token_class`` tells the class of each token of ``x``; -1 marks padding.
        """
        graphdef, state = nnx.split(stack)

        def body(carry, layer):
            return nnx.merge(graphdef, layer)(carry, context), None

        return jax.lax.scan(body, x, state)[0]

    def module(self, name: str, module: nnx.Module, x: Any, classes: jax.Array) -> Any:
        """Call one module that stands outside the stacks (patch embedding, merger).

        ``x``: an array, or a tuple of arrays with the same leading axis.
        ``classes``: int32, the token class of each row that its first quantisation point sees;
        -1 marks padding. Only calibration looks at it.
        """
        return module(x)


SCAN = Runner()
