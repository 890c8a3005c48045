"""Helpers of many tests: goldens, tiny models, and inspection of traced programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mquant_jax.errors import UserError
from mquant_jax.models.base import VLM, Family, abstract_model
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.llama.modeling import Llama
from mquant_jax.models.llama.weights import weight_rules as llama_rules
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.modeling import Qwen2VL
from mquant_jax.models.qwen2_vl.weights import weight_rules
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.numerics import QWeight, quantize_weight
from mquant_jax.ops.dense import DENSE, Product
from mquant_jax.ops.registry import Choice, recording
from mquant_jax.ptq.pipeline import Conversion
from mquant_jax.ptq.statistics import Statistics
from mquant_jax.recipe import Recipe
from mquant_jax.target import CPU_LIMITS, Target, tracing_for

GOLDENS = Path(__file__).parent / "goldens"
Arrays = dict[str, np.ndarray]
# Shared, so that models of the same structure share compiled programs within a test file.
forward = jax.jit(lambda model, batch: model(batch))


def mostly_slow(cases: Sequence[Any], *fast: Any) -> list[Any]:
    """The cases as parameters of a test; all except ``fast`` are marked slow."""
    assert set(fast) <= set(cases)
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def relative(got: Any, expected: Any) -> float:
    """``||got - expected|| / ||expected||`` in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def golden(family: str, case: str) -> tuple[dict[str, Any], Arrays, Arrays]:
    """``(config.json, inputs, outputs)`` of a golden."""
    folder = GOLDENS / family / case
    config = json.loads((folder / "config.json").read_text())
    names = ("inputs", "outputs")
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in names)
    return config, inputs, outputs


def has_pictures(case: str) -> bool:
    """Whether the inputs of ``family/case`` include pixels, which are their only floats."""
    inputs = load_file(GOLDENS / case / "inputs.safetensors")
    return any(np.issubdtype(value.dtype, np.floating) for value in inputs.values())


def golden_pictures(case: str) -> list[np.ndarray]:
    """The raw pictures of ``family/case``, before preprocessing."""
    inputs = golden(*case.split("/"))[1]
    return [inputs[name] for name in sorted(inputs) if inputs[name].dtype == np.uint8]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Run on the CPU with its own implementations: the reference for accelerator kernels, on
    machines that have an accelerator."""
    with jax.default_device(jax.devices("cpu")[0]), tracing_for("cpu"):
        yield


def form_of(rows: int, w: QWeight, activations: str = "int8") -> str:
    """The implementation chosen for a product with ``w`` on the current target."""
    return DENSE.choose(Product.of(rows, w, activations)).name


@contextlib.contextmanager
def interpreting(platform: str, **limits: int) -> Iterator[list[Choice]]:
    """Trace for an accelerator; without one, kernels run in interpret mode. Yields the list of
    implementations chosen so far."""
    to = Target.named(platform)
    to = dataclasses.replace(
        to, interpret=jax.default_backend() != platform,
        limits=dataclasses.replace(to.limits, **limits),
    )  # fmt: skip
    with tracing_for(to), recording() as choices:
        yield choices


def cpu_target(
    features: frozenset[str] = frozenset(), jax_version: tuple[int, ...] = (0, 10), **limits: int
) -> Target:
    """A CPU target; by default without byte products and without reading weights in place."""
    changed = dataclasses.replace(CPU_LIMITS, **{"short_row": 0} | limits)
    return Target("cpu", features=features, jax_version=jax_version, limits=changed)


def fails(word: str, call: Callable[[], Any]) -> None:
    """Check that ``call()`` raises a ``UserError`` that matches ``word``."""
    with pytest.raises(UserError, match=word):
        call()


def golden_model(case: str) -> tuple[Family, VLM, Any, Arrays, Arrays]:
    """``family/case`` -> the family, its float model, config, inputs and outputs."""
    hf, inputs, outputs = golden(*case.split("/"))
    family = family_for(hf, "config.json")
    config = family.config_from_hf(hf)
    source = load_file(GOLDENS / case / "model.safetensors")
    model = abstract_model(family, config, Recipe())
    rules = family.weight_rules(config)
    set_params(model, {r.dst: r.apply(source[r.src]) for r in rules})
    return family, model, config, inputs, outputs


def golden_qwen2_vl(case: str) -> tuple[Qwen2VL, Qwen2VLConfig, Arrays, Arrays]:
    """The float model of a Qwen2-VL golden, its config, inputs and outputs."""
    hf, inputs, outputs = golden("qwen2_vl", case)
    config = Qwen2VLConfig.from_hf(hf)
    source = load_file(GOLDENS / "qwen2_vl" / case / "model.safetensors")
    model = nnx.eval_shape(lambda: Qwen2VL(config, rngs=nnx.Rngs(0)))
    set_params(model, {r.dst: r.apply(source[r.src]) for r in weight_rules(config)})
    return model, config, inputs, outputs


def looked(family: Family, config: Any, params: dict[str, Any], batches: Any) -> Statistics:
    """Statistics of the float model at its quantisation points, column statistics included."""
    seen = Statistics(columns=True)
    Conversion(family, config, Recipe(), params, batches).walk("look", Recipe(), seen)
    return seen


def quantised(family, config, recipe: Recipe, params: dict[str, Any], batch) -> np.ndarray:
    """Logits of a model built from the tensors returned by ``quantize_params``."""
    model = abstract_model(family, config, recipe)
    set_params(model, dict(params))
    return np.asarray(forward(model, batch))


def golden_llama(family: str, **changes: Any) -> tuple[Llama, LlamaConfig, Arrays, Arrays]:
    """The float model of a text-only golden (``llama`` or ``qwen2``), config, inputs, outputs.

    ``changes`` are made to config.json. Tensors that exist in the golden keep its weights; new
    ones are random.
    """
    hf, inputs, outputs = golden(family, "public")
    config = LlamaConfig.from_hf(hf | changes)
    source = load_file(GOLDENS / family / "public" / "model.safetensors")
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {}
    for r in llama_rules(config):
        if r.src not in source:
            source[r.src] = rng.normal(0, 0.3, r.src_shape).astype(np.float32)
        params[r.dst] = r.apply(source[r.src])
    set_params(model, params)
    return model, config, inputs, outputs


def random_quantised(
    config: Qwen2VLConfig, recipe: Recipe, seed: int = 0, dtype=jnp.float32
) -> Qwen2VL:
    """A model quantised by ``recipe``, with random integer weights."""
    model = Qwen2VL(config, recipe, dtype, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    params = get_params(model)
    for name, value in params.items():
        if isinstance(value, QWeight):
            shape = (*value.values.shape[:-1], value.in_features)
            weight = jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.float32)
            random = quantize_weight(weight, value.bits, value.in_features // value.groups)
            random = random.packed() if value.storage == "packed" else random
            params[name] = jax.tree.map(np.asarray, random)
    set_params(model, params)
    return model


@dataclasses.dataclass
class WeightUse:
    """How a traced program uses its 8-bit inputs, which are the quantised weights.

    Attributes:
        dots: dtypes ``(left, right, result)`` of each dot_general with a weight operand.
        float_copies: operations that convert a weight matrix to floats.
    """

    dots: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    float_copies: list[str] = dataclasses.field(default_factory=list)

    @property
    def integer_only(self) -> bool:
        """Every product with a weight is s8 x s8 -> s32, and no weight is converted to float."""
        wanted = ("int8", "int8", "int32")
        return bool(self.dots) and set(self.dots) == {wanted} and not self.float_copies


def integer_dots(fn: Callable[..., Any], *args: Any) -> WeightUse:
    """Trace ``fn(*args)`` and follow every int8 or uint8 input to the products that use it.

    Descends into jit, scan, while, cond and custom derivatives. A scan body counts once, for any
    number of iterations.
    """
    closed = jax.make_jaxpr(fn)(*args)
    use = WeightUse()
    marks = [v.aval.dtype in (jnp.int8, jnp.uint8) for v in closed.jaxpr.invars]
    _follow(closed.jaxpr, marks, use)
    return use


def _follow(jaxpr: Any, marks: Sequence[bool], use: WeightUse) -> list[bool]:
    """Walk one jaxpr. ``marks`` tells which inputs derive from weights; the result tells the same
    of the outputs."""
    marked = {v for v, mark in zip(jaxpr.invars, marks, strict=True) if mark}

    def is_marked(v: Any) -> bool:
        return not hasattr(v, "val") and v in marked

    for eqn in jaxpr.eqns:
        ins = [is_marked(v) for v in eqn.invars]
        outs = _step(eqn, ins, use)
        marked.update(v for v, mark in zip(eqn.outvars, outs, strict=True) if mark)
    return [is_marked(v) for v in jaxpr.outvars]


def _step(eqn: Any, ins: list[bool], use: WeightUse) -> list[bool]:
    """Whether each output of one operation derives from weights (a product's result does not)."""
    p, name = eqn.params, eqn.primitive.name
    if name == "dot_general":
        if any(ins):
            avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            use.dots.append(tuple(str(a.dtype) for a in avals))
        return [False]
    if name == "while":
        first = p["cond_nconsts"]
        return _follow(p["body_jaxpr"].jaxpr, ins[first:], use)
    if name == "cond":
        branches = [_follow(b.jaxpr, ins[1:], use) for b in p["branches"]]
        return [any(marks) for marks in zip(*branches, strict=True)]
    inner = p.get("jaxpr", p.get("call_jaxpr"))
    if inner is not None:
        return _follow(getattr(inner, "jaxpr", inner), ins, use)
    for v in eqn.outvars if any(ins) else ():
        if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.ndim >= 2:
            use.float_copies.append(f"{name} -> {v.aval}")
    return [any(ins)] * len(eqn.outvars)


def dot_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of all matrix products in the trace of ``fn(*args)``.

    A scan body counts once per iteration.
    """
    return _flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        p = eqn.params
        if eqn.primitive.name == "dot_general":
            (left, _), _ = p["dimension_numbers"]
            shared = np.prod([eqn.invars[0].aval.shape[i] for i in left])
            total += int(2 * shared * np.prod(eqn.outvars[0].aval.shape))
        inner = p.get("jaxpr", p.get("call_jaxpr"))
        if inner is not None:
            total += p.get("length", 1) * _flops(getattr(inner, "jaxpr", inner))
    return total
