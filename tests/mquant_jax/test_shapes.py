"""Annotations of arrays in ``ops`` and ``nn``: everything has one, and models keep to them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mquant_jax.models.base import VLM, Batch, abstract_model
from mquant_jax.nn.cache import KVCache
from mquant_jax.presets import PRESETS
from mquant_jax.recipe import Recipe
from tests.family_cases import batch_of, family_of
from tests.helpers import GOLDENS, golden

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("ops", "nn") for path in (ROOT / "mquant_jax" / top).glob("*.py"))
MODELS = (
    (Recipe(), jnp.float32),
    (PRESETS["w4a8"], jnp.bfloat16),
    (PRESETS["w4a8-dynamic"], jnp.float32),
)
BARE = {"jax.Array", "Array", "np.ndarray", "AnyArray"}


# Annotations are there.


def unshaped(annotation: ast.expr) -> Iterator[str]:
    """Array types without a shape; what a function that is passed takes and returns is its own."""
    if ast.unparse(annotation) in BARE:
        yield ast.unparse(annotation)
    elif isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value) == "Callable":
            return
        shaped = isinstance(annotation.slice, ast.Tuple) and isinstance(
            annotation.slice.elts[-1], ast.Constant
        )
        if not shaped:
            yield from unshaped(annotation.slice)
    else:
        for part in ast.iter_child_nodes(annotation):
            if isinstance(part, ast.expr):
                yield from unshaped(part)


def faults_of(function: ast.FunctionDef, method: bool) -> Iterator[str]:
    args = function.args
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    named = [*args.posonlyargs, *args.args][method and not static :] + args.kwonlyargs
    hints = {arg.arg: arg.annotation for arg in named} | {"its result": function.returns}
    for name, hint in hints.items():
        if hint is None:
            yield f"{function.name}: {name} has no annotation"
        else:
            yield from (f"{function.name}: {name} is {kind}" for kind in unshaped(hint))


def faults(body: list[ast.stmt], method: bool = False) -> Iterator[str]:
    """What is missing in the public functions, methods and aliases of a module or class."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from faults(node.body, method=True)
        elif isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name == "__call__":
                yield from faults_of(node, method)
        elif isinstance(node, ast.Assign) and not method:
            yield from (f"{ast.unparse(node.targets[0])} is {k}" for k in unshaped(node.value))


def test_every_public_array_has_a_shape() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in SOURCES
        for fault in faults(ast.parse(path.read_text(encoding="utf-8")).body)
    ]
    assert not found, "\n".join(found)


def test_what_is_missing_is_found() -> None:
    source = """
Rows = tuple[jax.Array, Float[Array, "n"]]
def f(x: jax.Array, y, *, z: Float[Array, "n"] | AnyArray) -> Callable[[jax.Array], None]: ...
def _private(x): ...
class A:
    def g(self, x: Float[Array, "n"]): ...
    def __call__(self) -> Flow[np.ndarray]: ...
"""
    assert list(faults(ast.parse(source).body)) == [
        "Rows is jax.Array",
        "f: x is jax.Array",
        "f: y has no annotation",
        "f: z is AnyArray",
        "g: its result has no annotation",
        "__call__: its result is np.ndarray",
    ]


# Models keep to them.


def in_a_process(code: str) -> None:
    """What ``tests.checked_shapes`` does must come before the package is imported."""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def steps(model: VLM, batch: Batch, int8: bool) -> tuple[jax.Array, jax.Array, KVCache]:
    """Logits without a cache, and those of a token after a prompt, with the cache behind it."""
    rows, width = batch.input_ids.shape
    logits, cache = model.prefill(batch, model.language.init_cache(rows, width + 2, int8))
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    next_logits, cache = model.decode(token, batch.lengths, batch.next_position, cache)
    return model(batch), next_logits, cache


def trace(*cases: str) -> None:
    """Trace a float, a static and a dynamic model of each golden: shapes alone are looked at."""
    for case in cases:
        family, config = family_of(golden(*case.split("/"))[0])
        batch = batch_of(family, config, case)
        for recipe, dtype in MODELS:
            model = abstract_model(family, config, recipe, dtype)
            run = partial(steps, int8=recipe.head.quantised)
            jax.eval_shape(run, model, batch)


def traced(*cases: str) -> None:
    in_a_process(f"import tests.checked_shapes\nfrom {__name__} import trace\ntrace(*{cases!r})\n")


def test_models_keep_to_their_shapes() -> None:
    """Windows, taps, resampler, visual experts: between them all modules of ``nn``."""
    traced("qwen2_5_vl/public", "qwen3_vl/public", "qwen_vl/public", "cogvlm2/public")


@pytest.mark.slow
def test_all_models_keep_to_their_shapes() -> None:
    folders = (path.parent for path in GOLDENS.glob("*/*/config.json"))
    traced(*sorted("/".join(path.parts[-2:]) for path in folders))


def test_what_does_not_fit_is_refused() -> None:
    in_a_process("""
import tests.checked_shapes
import jax.numpy as jnp, jaxtyping, pytest
from mquant_jax.nn.norm import RMSNorm
from mquant_jax.ops.norm import rms_norm
from mquant_jax.ops.dense import float_dot
from mquant_jax.ops.rotate import rotate
x, ids = jnp.ones((2, 8)), jnp.ones((2, 8), jnp.int32)
assert rms_norm(x, x[0], 1e-6, x.dtype).shape == x.shape
for wrong in (
    lambda: rms_norm(x, x[0, :1], 1e-6, x.dtype),  # would broadcast
    lambda: rms_norm(ids, x[0], 1e-6, x.dtype),
    lambda: float_dot(x, x[0]),
    lambda: RMSNorm(8, 1e-6)(ids),
    lambda: rotate(ids, None),
):
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong()
""")


def test_the_package_does_not_need_what_checks_it() -> None:
    in_a_process("""
import sys
sys.modules |= dict.fromkeys(("jaxtyping", "beartype"))  # importing them fails
import mquant_jax.models.registry as registry, mquant_jax.runtime.generate, mquant_jax.ptq.pipeline
assert "mquant_jax.shapes" in sys.modules
""")
