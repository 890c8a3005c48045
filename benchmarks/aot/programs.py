"""A model's three programs from shapes alone, compiled for a device, with what they compute."""

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
from mquant_jax.ops.dense import held, target_platform
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.generate import decode, prefill

PROGRAMS = ("vision", "prefill", "decode")
# A float model that is too large is compiled with so many layers, which stand for all.
CUT = 7


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compiled.

    Attributes:
        family, config: the model.
        batch: one prompt; host arrays, of which only the shapes count.
        slots: of the cache.
    """

    family: Family
    config: Any
    batch: Batch
    slots: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        compiled: as it is; ``False``: the compiler found that it does not fit the device, and what
            is told here is of the same program with fewer layers, multiplied out.
        memory: bytes on the device: ``arguments`` (weights of the whole model, cache, inputs),
            ``outputs`` that are no donated arguments, ``temporary``, ``code`` and their ``total``.
        cost: see :class:`Cost`.
        flops: operations by operand type.
        error: the compiler's words where it refused.
    """

    compiled: bool
    memory: dict[str, float]
    cost: Cost
    flops: dict[str, float]
    error: str | None = None


def prompt(family: Family, config: Any, tokens: int, side: int) -> Batch:
    """One prompt of exactly ``tokens`` tokens with one picture of ``side`` pixels.

    Raises:
        ValueError: the picture alone takes more.
    """
    text = tokens
    for _ in range(3):  # markers around the picture may depend on nothing but it
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
    """The function to compile, shapes of its arguments, and which of them to donate."""
    config = setup.config
    if recipe.rotate:  # the final norm goes into the head and not into the embedding
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
    _, held = jax.eval_shape(start, params, batch)
    token = placed(jax.ShapeDtypeStruct((1,), jnp.int32))
    return (
        lambda p, t, s: decode(nnx.merge(graphdef, p), t, s),
        (params, token, placed(held)),
        (2,),
    )


def loaded(model: nnx.Module) -> nnx.Module:
    """The model with its weights in the form in which the platform holds them."""

    def convert(leaf: Any) -> Any:
        return held(leaf) if isinstance(leaf, QWeight) else leaf

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, QWeight))


def compile_program(
    setup: Setup, recipe: Recipe, program: str, device: Device, where: Sharding
) -> Program:
    """Compile one of :data:`PROGRAMS` for one chip and add up what it costs.

    A program that the compiler refuses for lack of memory is compiled with :data:`CUT` layers.
    """
    with target_platform(device.platform, device.name):
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
    # Weights that a program does not read (the tower, in decode) are on the device all the same.
    jitted = jax.jit(function, donate_argnums=donated, keep_unused=True)
    compiled = jitted.lower(*args).compile()
    held = compiled.memory_analysis()
    memory = {
        "arguments": held.argument_size_in_bytes,
        "outputs": held.output_size_in_bytes - held.alias_size_in_bytes,
        "temporary": held.temp_size_in_bytes,
        "code": held.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}, compiled.as_text()


def size(tree: Any) -> int:
    """Bytes of a tree of shapes, int4 two per byte."""
    return sum(-(-x.size * jnp.iinfo(x.dtype).bits // 8) if x.dtype in _NARROW
               else x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # fmt: skip


_NARROW = (jnp.int4, jnp.uint4)
_INTEGERS = {"int8", "uint8", "int4", "uint4"}


def flop_count(jaxpr: Any, times: int = 1) -> dict[str, float]:
    """Operations of all matrix products in a traced program, two per multiplication-addition.

    Returns:
        ``int8`` (both operands integers) and ``bf16`` (all others) -> operations; kernels count as
        their own cost estimates say.
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
