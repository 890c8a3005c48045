"""Compile a model's three programs for a device from shapes alone, and count what they compute."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Sharding

from benchmarks.aot.cost import Cost, program_cost
from benchmarks.aot.devices import Device
from benchmarks.aot.hlo import parse
from mquant_jax.models.base import Batch, Family, abstract_model
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.generate import decode, prefill
from mquant_jax.target import tracing_for

PROGRAMS = ("vision", "prefill", "decode")
# Layers to compile of a float model that is too large; costs are scaled up to all layers.
CUT = 7


@dataclasses.dataclass(frozen=True)
class Setup:
    """What to compile.

    Attributes:
        family, config: the model.
        batch: one prompt as host arrays, of which only the shapes matter.
        slots: number of cache slots.
    """

    family: Family
    config: Any
    batch: Batch
    slots: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        compiled: whether it compiled; if not, it does not fit the device, and the other figures
            are scaled up from the same program with fewer layers.
        memory: bytes on the device: ``arguments`` (weights of the whole model, cache, inputs),
            ``outputs`` other than donated arguments, ``temporary``, ``code`` and their ``total``.
        cost: see :class:`Cost`.
        flops: operations by operand type.
        error: the compiler's message if it refused the program.
    """

    compiled: bool
    memory: dict[str, float]
    cost: Cost
    flops: dict[str, float]
    error: str | None = None


def prompt(family: Family, config: Any, tokens: int, side: int) -> Batch:
    """Return one prompt of exactly ``tokens`` tokens with one picture of ``side`` pixels.

    Raises:
        ValueError: the picture alone takes more tokens.
    """
    text = tokens
    for _ in range(3):  # converges: the number of marker tokens depends only on the picture
        made = family.example_prompt(config, text, side)
        if len(made.input_ids) == tokens:
            return family.collate(config, [made])
        text -= len(made.input_ids) - tokens
        if text < 1:
            raise ValueError(f"a picture of {side} pixels leaves no text in {tokens} tokens")
    raise ValueError(f"no prompt of {tokens} tokens with a picture of {side} pixels")


def build(
    setup: Setup, recipe: Recipe, program: str, where: Sharding | None
) -> tuple[Callable, tuple, tuple[int, ...]]:
    """Return the function to compile, the shapes of its arguments, and which arguments to
    donate."""
    config = setup.config
    if recipe.rotate:  # folding the final norm into the head unties it from the embedding
        config = dataclasses.replace(
            config, language=dataclasses.replace(config.language, tied_head=False)
        )
    model = abstract_model(setup.family, config, recipe, jnp.bfloat16)
    graphdef, state = nnx.split(jax.eval_shape(loaded, model))

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def start(params, batch):
        return prefill(nnx.merge(graphdef, params), batch, setup.slots)

    params, batch = placed(state), placed(setup.batch)
    if program == "vision":
        return lambda p, b: nnx.merge(graphdef, p).visual(b), (params, batch), ()
    if program == "prefill":
        return start, (params, batch), ()
    _, cache = jax.eval_shape(start, params, batch)
    token = placed(jax.ShapeDtypeStruct((1,), jnp.int32))
    return (
        lambda p, t, s: decode(nnx.merge(graphdef, p), t, s),
        (params, token, placed(cache)),
        (2,),
    )


def loaded(model: nnx.Module) -> nnx.Module:
    """Return the model with its weights in the platform's storage format."""

    def convert(leaf: Any) -> Any:
        return held(leaf) if isinstance(leaf, QWeight) else leaf

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, QWeight))


def compile_program(
    setup: Setup, recipe: Recipe, program: str, device: Device, where: Sharding
) -> Program:
    """Compile one of :data:`PROGRAMS` for one chip and sum up its cost.

    If the compiler refuses it for lack of memory, it is compiled with :data:`CUT` layers instead.
    """
    with tracing_for(device.platform, device.name):
        full = build(setup, recipe, program, where)
        flops = flop_count(jax.make_jaxpr(full[0])(*full[1]).jaxpr)
        try:
            memory, text = _compile(full)
            return Program(True, memory, program_cost(parse(text), device), flops)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            error = str(e).splitlines()[0]
        language = setup.config.language
        cut = dataclasses.replace(language, num_layers=CUT)
        small = dataclasses.replace(setup, config=dataclasses.replace(setup.config, language=cut))
        few = build(small, recipe, program, where)
        memory, text = _compile(few)
    memory["arguments"] += size(full[1]) - size(few[1])
    outputs = [size(jax.eval_shape(f, *args)) for f, args, _ in (full, few)]
    if not full[2]:
        memory["outputs"] += outputs[0] - outputs[1]
    memory["total"] = sum(v for k, v in memory.items() if k != "total")
    cost = program_cost(parse(text), device, {CUT: language.num_layers})
    return Program(False, memory, cost, flops, error)


def _compile(made: tuple[Callable, tuple, tuple[int, ...]]) -> tuple[dict[str, float], str]:
    function, args, donated = made
    # Keep weights that a program does not read (the tower, in decode): they occupy memory too.
    jitted = jax.jit(function, donate_argnums=donated, keep_unused=True)
    compiled = jitted.lower(*args).compile()
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}, compiled.as_text()


def size(tree: Any) -> int:
    """Return the bytes of a tree of shapes, with two int4 per byte."""
    return sum(-(-x.size * jnp.iinfo(x.dtype).bits // 8) if x.dtype in _NARROW
               else x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # fmt: skip


_NARROW = (jnp.int4, jnp.uint4)
_INTEGERS = {"int8", "uint8", "int4", "uint4"}


def flop_count(jaxpr: Any, times: int = 1) -> dict[str, float]:
    """Count the operations of all matrix products in a traced program, two per multiply-add.

    Returns:
        ``int8`` (both operands integers) and ``bf16`` (all others) -> operations; kernels count by
        their own cost estimates.
    """
    total: collections.Counter = collections.Counter(int8=0.0, bf16=0.0)
    for eqn in jaxpr.eqns:
        name, runs = eqn.primitive.name, times
        kinds = [str(v.aval.dtype) for v in eqn.invars[:2] if hasattr(v.aval, "dtype")]
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            length = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            kind = "int8" if set(kinds) <= _INTEGERS else "bf16"
            total[kind] += 2.0 * length * eqn.outvars[0].aval.size * times
        elif name == "pallas_call":
            estimate = eqn.params.get("cost_estimate")
            everything = {str(v.aval.dtype) for v in eqn.invars}
            kind = "int8" if everything & _INTEGERS else "bf16"
            total[kind] += float(estimate.flops if estimate else 0) * times
            continue
        elif name == "scan":
            runs = times * eqn.params["length"]
        for inner in jaxprs_in_params(eqn.params):
            total.update(flop_count(inner, runs))
    return dict(total)
