"""Names of a model's tensors, and the way between stacked (run time) and separate (disk) layers.

A tensor's name is its path in the module tree, ``language/layers/3/q_proj/kernel``. In the
module, every parameter below an attribute called ``layers`` carries a leading layer axis; its name
then gets the layer's number after ``layers``. Where layers differ, there is a stack for each run of
equal ones, ``language/layers/from_3/q_proj/kernel``. Values are arrays or :class:`QWeight`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from mquant_jax.numerics import empty_aligned

STACK = "layers"
_SEGMENT = "from_"
_THREADS = min(4, os.cpu_count() or 1)  # NumPy copies without holding the interpreter
Params = dict[str, Any]


def variables(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Variable]]:
    """Every parameter with its path in the module tree; stacked layers stay stacked."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield tuple(map(str, path)), variable


def segment_name(first: int) -> str:
    """The attribute that holds the equal layers from number ``first`` on."""
    return f"{_SEGMENT}{first}"


def first_of(name: str) -> int | None:
    """The number of the first layer of a segment's attribute; ``None``: it is none."""
    number = name.removeprefix(_SEGMENT)
    return int(number) if number != name and number.isdigit() else None


def numbered_paths(path: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """The paths of the layers of something in a stack of ``count``, a parameter or a module."""
    at = path.index(STACK) + 1
    first = first_of(path[at]) if at < len(path) else None
    rest = path[at + (first is not None) :]
    return [(*path[:at], str((first or 0) + i), *rest) for i in range(count)]


def layer_names(path: tuple[str, ...], value: Any) -> list[str]:
    """The names of a (possibly stacked) parameter, layer by layer."""
    if STACK not in path:
        return ["/".join(path)]
    count = jax.tree.leaves(value)[0].shape[0]
    return ["/".join(one) for one in numbered_paths(path, count)]


def abstract_params(model: nnx.Module) -> Params:
    """Name -> ``ShapeDtypeStruct`` (or a QWeight of them) of one layer's tensor."""
    out: Params = {}
    for path, variable in variables(model):
        value = variable.get_value()
        names = layer_names(path, value)
        skip = STACK in path

        def struct(x, skip=skip):
            return jax.ShapeDtypeStruct(x.shape[1:] if skip else x.shape, x.dtype)

        out.update(dict.fromkeys(names, jax.tree.map(struct, value)))
    return out


def layer_path(name: str, tied_head: bool) -> str | None:
    """The path of the dense layer, or table, whose weight a tensor is, if it is one; that of a tied
    table is the head's."""
    if name == "language/embedding":
        return "language/head" if tied_head else name
    path, _, leaf = name.rpartition("/")
    return path if leaf == "kernel" else None


def dense_layers(model: nnx.Module) -> Params:
    """The weight of each dense layer and table of a whole model, as :func:`abstract_params` has it,
    by :func:`layer_path`."""
    params = abstract_params(model)
    tied = "language/head/kernel" not in params
    paths = {name: layer_path(name, tied) for name in params}
    return {path: params[name] for name, path in paths.items() if path is not None}


def get_params(model: nnx.Module) -> Params:
    """Name -> NumPy array (or QWeight of them), layers separate."""
    out: Params = {}
    for path, variable in variables(model):
        value = jax.tree.map(np.asarray, variable.get_value())
        names = layer_names(path, value)
        for i, name in enumerate(names):
            out[name] = jax.tree.map(lambda x, i=i: x[i], value) if STACK in path else value
    return out


def set_params(
    model: nnx.Module, params: Params, hold: Callable[[Any, Any], Any] | None = None
) -> None:
    """Fill an abstract model in place, stacking layers; entries of ``params`` are consumed.

    Args:
        hold: ``hold(value, like)`` gives what is to be held of a value, where the model has
            ``like``; called from several threads.

    Raises:
        KeyError: a tensor of the model is not in ``params``.
    """

    def made(item: tuple[tuple[str, ...], nnx.Variable]) -> Any:
        path, variable = item
        like = variable.get_value()
        values = [params.pop(name) for name in layer_names(path, like)]
        value = jax.tree.map(_stacked, *values) if STACK in path else values[0]
        value = value if hold is None else hold(value, like)
        # Nothing else refers to a stacked array, so it may be donated.
        put = jax.device_put if STACK in path else jax.numpy.asarray
        return jax.tree.map(put, value)

    with ThreadPoolExecutor(_THREADS) as pool:
        todo = list(variables(model))
        for (path, _), value in zip(todo, pool.map(made, todo), strict=True):
            assign(model, path, value)


def _stacked(*layers: Any) -> np.ndarray:
    """Layers one after the other."""
    first = np.asarray(layers[0])
    return np.stack(layers, out=empty_aligned((len(layers), *first.shape), first.dtype))


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
    """Bytes that the values take where they are held; int4 takes half of one."""
    leaves = jax.tree.leaves(params)
    return sum(x.size // (2 if x.dtype == jax.numpy.int4 else 1) * x.dtype.itemsize for x in leaves)
