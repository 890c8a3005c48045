"""Names of a model's tensors, and the way between stacked (run time) and separate (disk) layers.

A tensor's name is its path in the module tree, ``language/layers/3/q_proj/kernel``. In the
module, every parameter below an attribute called ``layers`` carries a leading layer axis; its name
then gets the layer's number after ``layers``. Values are arrays or :class:`QWeight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

STACK = "layers"
Params = dict[str, Any]


def variables(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    """Every parameter with its path in the module tree; stacked layers stay stacked."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield tuple(map(str, path)), variable


def _layer_names(path: tuple[str, ...], value: Any) -> list[str]:
    """The names of a (possibly stacked) parameter, layer by layer."""
    if STACK not in path:
        return ["/".join(path)]
    at = path.index(STACK) + 1
    count = jax.tree.leaves(value)[0].shape[0]
    return ["/".join((*path[:at], str(i), *path[at:])) for i in range(count)]


def abstract_params(model: nnx.Module) -> Params:
    """Name -> ``ShapeDtypeStruct`` (or a QWeight of them) of one layer's tensor."""
    out: Params = {}
    for path, variable in variables(model):
        value = variable.get_value()
        names = _layer_names(path, value)
        skip = STACK in path

        def struct(x, skip=skip):
            return jax.ShapeDtypeStruct(x.shape[1:] if skip else x.shape, x.dtype)

        out.update(dict.fromkeys(names, jax.tree.map(struct, value)))
    return out


def get_params(model: nnx.Module) -> Params:
    """Name -> NumPy array (or QWeight of them), layers separate."""
    out: Params = {}
    for path, variable in variables(model):
        value = jax.tree.map(np.asarray, variable.get_value())
        names = _layer_names(path, value)
        for i, name in enumerate(names):
            out[name] = jax.tree.map(lambda x, i=i: x[i], value) if STACK in path else value
    return out


def set_params(model: nnx.Module, params: Params) -> None:
    """Fill an abstract model in place, stacking layers; entries of ``params`` are consumed.

    Raises:
        KeyError: a tensor of the model is not in ``params``.
    """
    for path, variable in variables(model):
        names = _layer_names(path, variable.get_value())
        values = [params.pop(name) for name in names]
        if STACK in path:
            value = jax.tree.map(lambda *xs: jax.numpy.asarray(np.stack(xs)), *values)
        else:
            value = jax.tree.map(jax.numpy.asarray, values[0])
        assign(model, path, value)


def find(model: nnx.Module, path: str) -> Any:
    """The module or parameter at a path."""
    for part in path.split("/"):
        model = getattr(model, part)
    return model


def assign(model: nnx.Module, path: tuple[str, ...], value: Any) -> None:
    """Set the parameter at ``path``."""
    node = model
    for part in path[:-1]:
        node = getattr(node, part)
    getattr(node, path[-1]).set_value(value)


def parameter_bytes(params: Params) -> int:
    """Bytes that the values take where they are held."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
